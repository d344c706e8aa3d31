"""Q4_K and Q5_K: 256 weights in 8 groups, scales and minimums of 6 bits.

    Q4_K   d f16 | dmin f16 | scales 12 bytes | qs 128 bytes                144 bytes
    Q5_K   d f16 | dmin f16 | scales 12 bytes | qh 32 bytes | qs 128 bytes  176 bytes
    weight = d * scale[g] * q - dmin * minimum[g]

Each 32 bytes of ``qs`` hold two groups, low halves first; bit ``j`` of ``qh[l]`` is bit 4 of weight
``32 * j + l``. Groups 0-3 keep their scale in the low six bits of bytes 0-3 and their minimum in
bytes 4-7; groups 4-7 keep four bits of both in bytes 8-11 (scale low, minimum high) and the upper
two in the top bits of bytes 0-3 and 4-7. Layout: GGML ``block_q4_K``, ``block_q5_K``.
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, bit_fields, half_pair


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 ``[N, 12]`` -> two float32 ``[N, 8]``, still without ``d`` and ``dmin``."""
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scale & 63, (rest & 15) | ((scale >> 2) & 48)), dim=1)
    minimums = torch.cat((minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)), dim=1)
    return scales.float(), minimums.float()


def _unpack_q4_k(blocks: Tensor) -> Unpacked:
    d, dmin = half_pair(blocks, 0)
    scale, minimum = _scales_and_minimums(blocks[:, 4:16])
    q = bit_fields(blocks[:, -128:].view(-1, 4, 32), 4)
    return Unpacked(q, scale.mul_(d), minimum.mul_(dmin).neg_())


def _unpack_q5_k(blocks: Tensor) -> Unpacked:
    unpacked = _unpack_q4_k(blocks)  # the same but for the bits that qh adds
    unpacked.q.bitwise_or_(bit_fields(blocks[:, 16:48].view(-1, 1, 32), 1, bit=4))
    return unpacked


FORMATS = (
    QuantFormat("Q4_K", 12, 256, 144, bits=4, group=32, signed=False, unpack=_unpack_q4_k),
    QuantFormat("Q5_K", 13, 256, 176, bits=5, group=32, signed=False, unpack=_unpack_q5_k),
)
