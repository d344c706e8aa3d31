"""Registration of operators: a schema, a torch reference, and what runs on accelerators.

Every operator lives in one ``torch.library`` namespace, ``squall``. The reference is the
CompositeExplicitAutograd implementation, so every device without a better one runs it as it is;
the launcher serves CUDA (and ROCm, which shares its dispatch key) and XPU; a file in
``kernels/backends`` may override single operators for its device (its ``OVERRIDES`` table).
Operators are opaque to ``torch.compile``: measured, this dispatches in 3.2 us a call where
``triton_op`` takes 8.6 us and does not compile on CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from squall.kernels.backends import device as backends
from squall.kernels.lang import triton
from squall.kernels.launch import current_device_of

NAMESPACE = "squall"
# FRAGMENT and not DEF: a second copy of this module in one process must not fail.
_LIBRARY = cast(Any, torch.library).Library(NAMESPACE, "FRAGMENT")


def op(
    schema: str,
    reference: Callable[..., Any],
    launcher: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``squall::<name>`` and return its default overload, ready to be called.

    ``schema`` is a torch schema without namespace, e.g. ``"silu_mul(Tensor x) -> Tensor"``;
    mutated arguments must be marked (``Tensor(a!)``) and results must not alias arguments or
    each other. ``fake`` gives result shapes when the reference reads tensor values; otherwise the
    reference itself is used. Registering the same schema again returns the operator that exists;
    a different schema under the same name raises ``ValueError``.
    """
    name = schema.partition("(")[0].strip()
    existing = getattr(getattr(torch.ops, NAMESPACE), name, None)
    if existing is not None:
        found, wanted = str(existing.default._schema), _canonical(schema)
        if found != wanted:
            raise ValueError(f"{NAMESPACE}::{name} is registered as {found}, not as {wanted}")
        return existing.default
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or reference, lib=_LIBRARY)
    if launcher is not None:
        override(name, "CUDA", _on_its_device(launcher, torch.cuda))
        override(name, "XPU", _on_its_device(launcher, torch.xpu))
    for key, fn in backends.overrides(name):
        override(name, key, fn)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def override(name: str, dispatch_key: str, fn: Callable[..., Any]) -> None:
    """Let ``fn`` run operator ``name`` for one dispatch key ("CPU", "CUDA", "XPU", "MPS").

    Raises ``ValueError`` when that key already has an implementation of its own.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key):
        raise ValueError(f"{NAMESPACE}::{name} already has an implementation for {dispatch_key}")
    _LIBRARY.impl(name, fn, dispatch_key)


def _canonical(schema: str) -> str:
    return str(torch._C.parse_schema(f"{NAMESPACE}::{schema}"))


def _on_its_device(launcher: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """Launch on the first argument's device: Triton itself launches on the current one. ``module``
    is ``torch.cuda`` or ``torch.xpu``."""
    current_device = current_device_of(module)

    @functools.wraps(launcher)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        index = first.get_device()
        if index == current_device():
            return launcher(first, *rest)
        with module.device(index):
            return launcher(first, *rest)

    return run


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (CUDA) or Xe cores (XPU) of a device.

    Any other device answers 132 (an H100), which is what kernels are compiled for where there is
    no GPU: Triton's interpreter and ahead-of-time compilation.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 132


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options that let a kernel start while the one before it drains (programmatic dependent
    launch, NVIDIA compute capability 9.0); empty elsewhere.

    A kernel launched so must wait for the one before it (``squall.kernels.lang.wait_for_inputs``
    and what stands beside it) before it touches anything that another kernel of the step writes, or
    writes what another one reads.
    """
    if device.type != "cuda" or torch.version.hip:
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may use NVIDIA's instructions: not in Triton's interpreter, not on other
    vendors' devices."""
    return device.type != "xpu" and torch.version.hip is None and not triton.knobs.runtime.interpret
