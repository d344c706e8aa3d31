"""Triton where it is installed, and stand-ins where it is not (macOS, Windows).

Kernel files take ``triton`` and ``tl`` from here, so that their torch references work without
Triton. A stand-in kernel cannot be launched: doing so raises ``RuntimeError``.
"""

from collections.abc import Callable
from typing import Any

__all__ = [
    "HAS_TRITON",
    "TensorDescriptor",
    "describable",
    "let_next_come",
    "next_power_of_2",
    "prefetch",
    "tl",
    "triton",
    "wait_for_first",
    "wait_for_inputs",
    "wait_for_last",
    "wait_in_order",
]


class _MissingKernel:
    """What ``@triton.jit`` gives without Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise RuntimeError(f"kernel {self._name} needs Triton, which is not installed")


class _MissingTriton:
    """The part of the ``triton`` module that kernel files use while they are imported."""

    @staticmethod
    def jit(fn: Callable[..., Any] | None = None, **_options: object) -> Any:
        if fn is None:
            return lambda decorated: _MissingKernel(decorated.__name__)
        return _MissingKernel(fn.__name__)


class _MissingLanguage:
    """The part of ``triton.language`` that kernel signatures use."""

    constexpr = None


triton: Any = _MissingTriton()
tl: Any = _MissingLanguage()
TensorDescriptor: Any = None
HAS_TRITON = False
try:
    import triton as _triton
    import triton.language as _language
    from triton.tools.tensor_descriptor import TensorDescriptor as _TensorDescriptor
except ImportError:
    pass
else:
    triton, tl, TensorDescriptor, HAS_TRITON = _triton, _language, _TensorDescriptor, True


@triton.jit
def let_next_come(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """With programmatic dependent launch: the next kernel may start beside this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """With programmatic dependent launch: wait until the kernel before is through.

    Every program must, even one without work: the next kernel takes the end of all programs for the
    end of everything before.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """With programmatic dependent launch: let the next kernel come, and wait for the last."""
    let_next_come(PDL)
    wait_for_last(PDL)


@triton.jit
def wait_in_order(PDL: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """``wait_for_inputs`` of a kernel that may run beside another one with the same inputs.

    "first" lets the next one come only when the inputs are there; "second" then need not wait, but
    calls ``wait_for_first`` at its end. "alone" is as usual.
    """
    if ORDER != "first":
        let_next_come(PDL)
    if ORDER != "second":
        wait_for_last(PDL)
    if ORDER == "first":
        let_next_come(PDL)


@triton.jit
def wait_for_first(PDL: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The end of a kernel with an ORDER: whoever waits for "second" has then waited for both."""
    if ORDER == "second":
        wait_for_last(PDL)


@triton.jit
def prefetch(row_ptr, start, end, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring BYTES of each row ``[R, 1]`` of ``end`` columns, from column ``start`` on, into the L2
    cache, by lines of 128 bytes."""
    LINE: tl.constexpr = 1024 // row_ptr.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(start + tl.arange(0, BYTES // 128) * LINE, end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(row_ptr + column[None, :]).to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def describable(matrix: Any) -> bool:
    """Whether a ``TensorDescriptor`` can describe a matrix of dense rows: they must begin at
    multiples of 16 bytes."""
    return (matrix.data_ptr() | matrix.stride(0) * matrix.element_size()) % 16 == 0


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (``n >= 1``)."""
    return 1 << (n - 1).bit_length()
