"""MXFP4: 32 weights of 4 bits, e2m1 numbers under a power of two.

    e u8 | qs 16 bytes             weight = 2^(e - 128) * q             17 bytes

Bits of ``qs`` as in Q4_0. A code stands for twice its e2m1 number, so that q is an integer: its low
three bits for 0, 1, 2, 3, 4, 6, 8, 12, its high bit for the sign (there is one zero). Layout: GGML
``block_mxfp4``; numbers: OCP Microscaling Formats v1.0, section 5.3.3, without its NaN (e = 255).
"""

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, Unpacked
from squall.kernels.quant.gguf_q4 import split_nibbles

CODES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def powers(exponents: Tensor) -> Tensor:
    """``2^(e - 128)`` of uint8 exponents, exactly: float32, of which e = 0 and 1 are subnormal."""
    e = exponents.to(torch.int32)
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def _unpack_mxfp4(blocks: Tensor) -> Unpacked:
    q = torch.tensor(CODES, dtype=torch.int8, device=blocks.device)
    return Unpacked(q[split_nibbles(blocks, 1).int()], powers(blocks[:, :1]), None)


FORMATS = (QuantFormat("MXFP4", 39, 32, 17, bits=5, group=32, signed=True, unpack=_unpack_mxfp4),)
