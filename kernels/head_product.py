"""A product with a matrix of its own for each head.

``x`` ``[T, H, K]`` and ``w`` ``[H, K, N]``, of one dtype (f32, f16, bf16), with any strides:

    y[t, h] = x[t, h] w[h]

Result: ``[T, H, N]``, dense. Sums are float32.
"""

import torch
from torch import Tensor

from squall.kernels.op import op


def head_product_reference(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("thk,hkn->thn", x, w).contiguous()


def _fake(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty((*x.shape[:2], w.shape[2]), dtype=x.dtype, device=x.device)


head_product = op("head_product(Tensor x, Tensor w) -> Tensor", head_product_reference, None, _fake)
