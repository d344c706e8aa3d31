"""Q4_0 and Q4_1: 32 weights of 4 bits.

    Q4_0   d f16 | qs 16 bytes             weight = d * (q - 8)      18 bytes
    Q4_1   d f16 | m f16 | qs 16 bytes     weight = d * q + m        20 bytes

Low halves of ``qs`` are weights 0-15, high halves 16-31. Layout: GGML ``block_q4_0``,
``block_q4_1``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, half, half_pair


def split_nibbles(blocks: Tensor, offset: int) -> Tensor:
    """The 16 bytes at ``offset`` as uint8 ``[N, 32]``: their low halves, then their high ones.

    Masking whole blocks first keeps the arithmetic on contiguous memory; only copies see strides.
    """
    q = torch.empty(blocks.shape[0], 32, dtype=torch.uint8, device=blocks.device)
    q[:, :16] = (blocks & 15)[:, offset : offset + 16]
    q[:, 16:] = (blocks >> 4)[:, offset : offset + 16]
    return q


def _unpack_q4_0(blocks: Tensor) -> Unpacked:
    q = split_nibbles(blocks, 2).view(torch.int8).sub_(8)
    return Unpacked(q, half(blocks, 0), None)


def _unpack_q4_1(blocks: Tensor) -> Unpacked:
    scale, minimum = half_pair(blocks, 0)
    return Unpacked(split_nibbles(blocks, 4), scale, minimum)


FORMATS = (
    QuantFormat("Q4_0", 2, 32, 18, bits=4, group=32, signed=True, unpack=_unpack_q4_0),
    QuantFormat("Q4_1", 3, 32, 20, bits=4, group=32, signed=False, unpack=_unpack_q4_1),
)
