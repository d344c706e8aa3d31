"""Intel GPUs."""

import torch

from squall.kernels.backends.device import Backend
from squall.kernels.lang import HAS_TRITON


def _available() -> str | None:
    if not torch.xpu.is_available():
        return "torch finds no Intel GPU or is built without XPU"
    return None if HAS_TRITON else "Triton is not installed"


def _memory(device: torch.device) -> tuple[int, int]:
    """Free includes what torch's allocator holds without using it."""
    free, total = torch.xpu.mem_get_info(device)
    cached = torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    return free + cached, total


BACKEND = Backend(
    type="xpu",
    dispatch_key="XPU",
    rank=1,
    available=_available,
    count=lambda: torch.xpu.device_count(),
    describe=lambda device: str(torch.xpu.get_device_name(device)),
    synchronize=lambda device: torch.xpu.synchronize(device),
    memory=_memory,
    default_dtype=lambda device: torch.bfloat16,
)
