"""Case tables: the inputs that a kernel's tests, ahead-of-time compile and bench share.

A kernel file ends with ``CASES``, a tuple of ``Case``. The same row is run against an independent
float64 formula on the CPU, by Triton's interpreter and natively on a GPU against the reference,
and is compiled ahead of time for every supported chip.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from squall import kernels

Builder = Callable[[torch.dtype, torch.device], tuple[Any, ...]]

BF16 = (torch.bfloat16,)
BOTH = (torch.bfloat16, torch.float32)

# Largest |got - want| over the largest |want| of a result, per dtype of that result. About ten
# roundings of the dtype for f16 and bf16; f32 leaves room for sums over 16,384 elements.
ERROR_LIMITS: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
)


@dataclass(frozen=True)
class Case:
    """One row of a case table.

    ``build(dtype, device)`` makes the operator's arguments, the same values for every device;
    ``mutates`` lists the argument positions the operator writes; ``interpret`` is false for
    shapes that take Triton's interpreter too long; ``aot`` lists the dtypes to compile ahead of
    time for, where a row is a kernel variant of its own and not just another size. ``through`` is
    for results that are finer than what leads to them: values pass through the dtype asked for, or
    through this one where it is coarser.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    launcher: Callable[..., Any]
    build: Builder
    mutates: tuple[int, ...] = ()
    interpret: bool = True
    aot: tuple[torch.dtype, ...] = ()
    through: torch.dtype | None = None

    def error_limit(self, result: torch.dtype, asked: torch.dtype) -> float:
        """For results of a dtype when ``build`` was asked for one."""
        limit = ERROR_LIMITS[result]
        if self.through is None:
            return limit
        return max(limit, ERROR_LIMITS[self.through], ERROR_LIMITS[asked])


def all_cases() -> tuple[Case, ...]:
    """The rows of every kernel file, found by walking the package; imports all kernels."""
    found: list[Case] = []
    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        if not module.name.startswith(f"{kernels.__name__}.backends"):
            found += getattr(importlib.import_module(module.name), "CASES", ())
    return tuple(case for case in found if isinstance(case, Case))


def results(case: Case, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """All that ``fn`` computed: its results, then the arguments it is allowed to write."""
    returned = fn(*args)
    if returned is None:
        returned = ()
    elif isinstance(returned, Tensor):
        returned = (returned,)
    return (*returned, *(args[i] for i in case.mutates))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest magnitude wanted; inf where only one is NaN.

    NaNs at the same places are equal: tests poison what must stay untouched.
    """
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    a, b = got.detach().cpu().double(), want.detach().cpu().double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal values that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
