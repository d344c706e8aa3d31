"""Q2_K: 256 weights of 2 bits in 16 groups, scales and minimums of 4 bits.

    scales 16 bytes | qs 64 bytes | d f16 | dmin f16                         84 bytes
    weight = d * (scales[g] & 15) * q - dmin * (scales[g] >> 4)

Each half of ``qs`` (32 bytes) holds four runs of 32 weights, two bits apart. Layout: GGML
``block_q2_K``.
"""

from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked, bit_fields, half_pair


def _unpack_q2_k(blocks: Tensor) -> Unpacked:
    d, dmin = half_pair(blocks, 80)
    scales = blocks[:, :16]
    scale = (scales & 15).float().mul_(d)
    minimum = (scales >> 4).float().mul_(dmin).neg_()
    return Unpacked(bit_fields(blocks[:, 16:80].view(-1, 2, 32), 2), scale, minimum)


FORMATS = (QuantFormat("Q2_K", 10, 256, 84, bits=2, group=16, signed=False, unpack=_unpack_q2_k),)
