"""Q8_0: 32 weights of 8 bits.

    d f16 | qs 32 int8      weight = d * q      34 bytes

Layout: GGML ``block_q8_0``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, half


def _unpack_q8_0(blocks: Tensor) -> Unpacked:
    q = blocks[:, 2:].view(torch.int8).clone(memory_format=torch.contiguous_format)
    return Unpacked(q, half(blocks, 0), None)


FORMATS = (QuantFormat("Q8_0", 8, 32, 34, bits=8, group=32, signed=True, unpack=_unpack_q8_0),)
