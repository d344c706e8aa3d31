"""Gated activations: ``act(gate) * up`` for ``x = [gate | up]``.

``x [T, 2F]`` (f32, f16, bf16; rows may be strided, columns are dense): the first F columns are
the gate, the last F the up projection. Result ``[T, F]``, dense, computed in float32 and rounded
once. ``silu_mul`` uses ``z * sigmoid(z)``; ``gelu_tanh_mul`` uses the tanh approximation
``0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`` (Hendrycks and Gimpel 2016, arXiv:1606.08415);
``clamped_silu_mul`` is GPT-OSS's ``z * sigmoid(1.702 z) * (up + 1)`` with z at most 7 and up within
-7 and 7.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import BOTH, Case, random
from squall.kernels.lang import tl
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import gate
from squall.kernels.op import op

CLAMP = 7.0  # GPT-OSS's "swiglu_limit"
CLAMPED_SLOPE = 1.702


def silu_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    if x.dtype == torch.float32:
        return F.silu(gate).mul_(up)
    return F.silu(gate.float()).mul_(up).to(x.dtype)


def gelu_tanh_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    if x.dtype == torch.float32:
        return F.gelu(gate, approximate="tanh").mul_(up)
    return F.gelu(gate.float(), approximate="tanh").mul_(up).to(x.dtype)


def clamped_silu_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return (gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)).to(x.dtype)


@kernel
def _gated_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, row_stride, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (rows, blocks of features)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < FEATURES
    source = x_ptr + row * row_stride + column
    z = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + FEATURES, mask=mask, other=0.0).to(tl.float32)
    y = gate(z, up, ACTIVATION)
    tl.store(y_ptr + row * FEATURES + column, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, activation: str) -> Tensor:
    assert x.dim() == 2, f"x {x.shape}"
    assert x.shape[1] % 2 == 0, f"x {x.shape}"
    assert x.stride(1) == 1, "rows must be dense"
    rows, features = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    block = 1024
    _gated_kernel[(rows, -(-features // block))](
        x, y, x.stride(0), features, activation, block, num_warps=4
    )
    return y


def silu_mul_launcher(x: Tensor) -> Tensor:
    return _launch(x, "silu")


def gelu_tanh_mul_launcher(x: Tensor) -> Tensor:
    return _launch(x, "gelu_tanh")


def clamped_silu_mul_launcher(x: Tensor) -> Tensor:
    return _launch(x, "clamped_silu")


silu_mul = op("silu_mul(Tensor x) -> Tensor", silu_mul_reference, silu_mul_launcher)
gelu_tanh_mul = op(
    "gelu_tanh_mul(Tensor x) -> Tensor", gelu_tanh_mul_reference, gelu_tanh_mul_launcher
)
clamped_silu_mul = op(
    "clamped_silu_mul(Tensor x) -> Tensor", clamped_silu_mul_reference, clamped_silu_mul_launcher
)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": lambda x: x,
        "silu": silu_mul,
        "gelu_tanh": gelu_tanh_mul,
        "clamped_silu": clamped_silu_mul,
    }
)


def _case(activation: str, tokens: int, features: int, strided: bool) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
        x = random((tokens, 2 * features + 16 * strided), dtype, device, 21)
        return (x[:, : 2 * features] * 3,) if not strided else (x[:, 16:],)

    fns = {
        "silu": (silu_mul, silu_mul_reference, silu_mul_launcher),
        "gelu_tanh": (gelu_tanh_mul, gelu_tanh_mul_reference, gelu_tanh_mul_launcher),
        "clamped_silu": (clamped_silu_mul, clamped_silu_mul_reference, clamped_silu_mul_launcher),
    }[activation]
    title = f"{activation}_mul-{tokens}x{features}{'-strided' if strided else ''}"
    return Case(title, *fns, build, aot=BOTH * (features == 1536))


def _cases() -> Iterator[Case]:
    for activation in ("silu", "gelu_tanh", "clamped_silu"):
        for tokens, features in ((1, 1536), (0, 64), (63, 1), (3, 1000), (1000, 63), (2, 4097)):
            yield _case(activation, tokens, features, strided=False)
        yield _case(activation, 5, 96, strided=True)


CASES = tuple(_cases())
