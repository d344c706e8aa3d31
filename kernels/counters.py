"""Arrival counters: how the programs of a kernel find out which of them is the last."""

import functools

import torch
from torch import Tensor

COUNT = 1 << 18


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Zeros, int32 ``[COUNT]``; every kernel leaves them as it found them.

    All kernels of a device share them: they run on one stream, and one that is launched while the
    last one drains counts nothing before that is through. RuntimeError when first asked for while a
    CUDA graph is captured: a replay would not set them to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a kernel once before capturing it in a CUDA graph")
    return torch.zeros(COUNT, dtype=torch.int32, device=device)
