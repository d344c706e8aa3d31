"""Q6_K: 256 weights of 6 bits in 16 groups, scales of 8 bits.

    ql 128 bytes | qh 64 bytes | scales 16 int8 | d f16                     210 bytes
    weight = d * scales[g] * (q - 32)

Either half of the block (128 weights) is four runs of 32: ``ql`` holds runs 0 and 1 in the low
halves of its 64 bytes and runs 2 and 3 in the high ones, ``qh`` the upper two bits of run ``k`` at
bit ``2 * k`` of its 32 bytes. Layout: GGML ``block_q6_K``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, bit_fields, half


def _unpack_q6_k(blocks: Tensor) -> Unpacked:
    q = bit_fields(blocks[:, :128].view(-1, 2, 64), 4)
    q |= bit_fields(blocks[:, 128:192].view(-1, 2, 32), 2, bit=4)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(half(blocks, 208))
    return Unpacked(q.view(torch.int8).sub_(32), scale, None)


FORMATS = (QuantFormat("Q6_K", 14, 256, 210, bits=6, group=16, signed=True, unpack=_unpack_q6_k),)
