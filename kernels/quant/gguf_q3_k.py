"""Q3_K: 256 weights of 3 bits in 16 groups, scales of 6 bits.

    hmask 32 bytes | qs 64 bytes | scales 12 bytes | d f16                  110 bytes
    weight = d * (scale[g] - 32) * (q - 4)

``qs`` holds the low two bits as in Q2_K; bit ``j`` of ``hmask[l]`` is the third bit of weight
``32 * j + l``. Of the 6-bit scales, bytes 0-7 hold the low four bits (groups 0-7 in the low halves,
8-15 in the high ones) and bytes 8-11 the high two (group ``4 * k + i`` in byte ``8 + i``, bits
``2 * k``). Layout: GGML ``block_q3_K``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, bit_fields, half


def _scales(packed: Tensor) -> Tensor:
    """uint8 ``[N, 12]`` -> float32 ``[N, 16]``, still without ``d``."""
    low, high = packed[:, :8], packed[:, 8:]
    scales = torch.cat((low & 15, low >> 4), dim=1)
    for k in range(4):
        scales[:, 4 * k : 4 * k + 4] |= ((high >> (2 * k)) & 3) << 4
    return scales.view(torch.int8).sub_(32).float()


def _unpack_q3_k(blocks: Tensor) -> Unpacked:
    q = bit_fields(blocks[:, 32:96].view(-1, 2, 32), 2)
    q |= bit_fields(blocks[:, :32].view(-1, 1, 32), 1, bit=2)
    scale = _scales(blocks[:, 96:108]).mul_(half(blocks, 108))
    return Unpacked(q.view(torch.int8).sub_(4), scale, None)


FORMATS = (QuantFormat("Q3_K", 11, 256, 110, bits=3, group=16, signed=True, unpack=_unpack_q3_k),)
