"""Q5_0 and Q5_1: 32 weights of 5 bits, the fifth kept apart.

    Q5_0   d f16 | qh 4 bytes | qs 16 bytes             weight = d * (q - 16)     22 bytes
    Q5_1   d f16 | m f16 | qh 4 bytes | qs 16 bytes     weight = d * q + m        24 bytes

``qs`` as in Q4_0; bit ``i`` of the little-endian word ``qh`` is bit 4 of weight ``i``. Layout: GGML
``block_q5_0``, ``block_q5_1``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, half, half_pair
from squall.kernels.quant.gguf_q4 import split_nibbles

_EVERY_BYTE = 0x0101010101010101
_BIT_OF_LANE = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as int64: bit i of byte i
_SEVEN_BITS = 0x7F7F7F7F7F7F7F7F
_BIT_4 = 0x1010101010101010


def fifth_bits(words: Tensor) -> Tensor:
    """uint8 ``[N, 4]`` -> uint8 ``[N, 32]``: 16 where bit ``i`` of the row is set, else 0.

    Eight weights at a time in one int64: copy the byte to every lane, keep a different bit in each,
    carry "not zero" to the lane's top bit, bring that down to bit 4.
    """
    lanes = words.to(torch.int64).mul_(_EVERY_BYTE).bitwise_and_(_BIT_OF_LANE).add_(_SEVEN_BITS)
    return lanes.bitwise_right_shift_(3).bitwise_and_(_BIT_4).view(torch.uint8)


def _unpack_q5_0(blocks: Tensor) -> Unpacked:
    q = split_nibbles(blocks, 6).bitwise_or_(fifth_bits(blocks[:, 2:6])).view(torch.int8).sub_(16)
    return Unpacked(q, half(blocks, 0), None)


def _unpack_q5_1(blocks: Tensor) -> Unpacked:
    scale, minimum = half_pair(blocks, 0)
    q = split_nibbles(blocks, 8).bitwise_or_(fifth_bits(blocks[:, 4:8]))
    return Unpacked(q, scale, minimum)


FORMATS = (
    QuantFormat("Q5_0", 6, 32, 22, bits=5, group=32, signed=True, unpack=_unpack_q5_0),
    QuantFormat("Q5_1", 7, 32, 24, bits=5, group=32, signed=False, unpack=_unpack_q5_1),
)
