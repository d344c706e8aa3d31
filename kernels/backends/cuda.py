"""NVIDIA GPUs, and AMD GPUs under ROCm builds of torch, which also call them "cuda"."""

import warnings

import torch

from squall.kernels.backends.device import Backend
from squall.kernels.lang import HAS_TRITON


def _available() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA or ROCm"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        # torch explains a driver that is too old, say, in a warning only.
        why = str(caught[-1].message).splitlines()[0] if caught else "no GPU or driver found"
        return f"torch cannot use CUDA ({why})"
    return None if HAS_TRITON else "Triton is not installed"


def _memory(device: torch.device) -> tuple[int, int]:
    """Free includes what torch's allocator holds without using it."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached, total


def _default_dtype(device: torch.device) -> torch.dtype:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


BACKEND = Backend(
    type="cuda",
    dispatch_key="CUDA",
    rank=0,
    available=_available,
    count=lambda: torch.cuda.device_count(),
    describe=lambda device: torch.cuda.get_device_name(device),
    synchronize=lambda device: torch.cuda.synchronize(device),
    memory=_memory,
    default_dtype=_default_dtype,
)
