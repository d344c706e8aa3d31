"""The norms of a decoder: an RMS norm is its weight, a layer norm has a class of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from squall.kernels.layernorm import layer_norm
from squall.kernels.rmsnorm import rms_norm


@dataclass(frozen=True)
class LayerNorm:
    """``weight`` and ``bias`` float32 ``[hidden]``."""

    weight: Tensor
    bias: Tensor | None

    def scaled(self, factor: float) -> "LayerNorm":
        """Its result times ``factor``."""
        return LayerNorm(self.weight * factor, None if self.bias is None else self.bias * factor)


Norm = Tensor | LayerNorm


def normed(stream: Tensor, norm: Norm | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm of ``stream`` ``[T, hidden]`` in ``dtype``; without ``norm`` the stream itself."""
    if norm is None:
        return stream.to(dtype)
    if isinstance(norm, LayerNorm):
        return layer_norm(stream, norm.weight, norm.bias, eps, dtype)
    return rms_norm(stream, norm, eps, dtype)
