"""Products with weights that were expanded into scratch memory, some rows at a time."""

import torch
from torch import Tensor

from squall.kernels.linear import blas


def blas_into(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = x w^T + bias`` by the vendor's library; rows of ``out`` may be strided."""
    if out.dtype != x.dtype:
        out.copy_(blas(x, w, bias, out.dtype))
    elif bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, w.t(), out=out)
