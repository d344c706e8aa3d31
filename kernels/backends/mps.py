"""Apple GPUs (Metal). Memory is shared with the CPU."""

import torch

from squall.kernels.backends.device import Backend


def _available() -> str | None:
    if not torch.backends.mps.is_built():
        return "this torch is built without Metal"
    if not torch.backends.mps.is_available():
        return "no Metal device found (macOS 14 or newer on Apple silicon is needed)"
    return None


def _memory(device: torch.device) -> tuple[int, int]:
    """What Metal recommends this process to use at most, and the part of it still free."""
    total = torch.mps.recommended_max_memory()
    return max(0, total - torch.mps.current_allocated_memory()), total


BACKEND = Backend(
    type="mps",
    dispatch_key="MPS",
    rank=2,
    available=_available,
    count=lambda: 1,
    describe=lambda device: "Apple GPU (Metal)",
    synchronize=lambda device: torch.mps.synchronize(),
    memory=_memory,
    default_dtype=lambda device: torch.float16,
)
