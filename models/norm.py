"""The norms of a decoder: an RMS norm is its weight, a layer norm has a class of its own."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerNorm:
    """``weight`` and ``bias`` float32 ``[hidden]``."""

    weight: Tensor
    bias: Tensor | None

    def scaled(self, factor: float) -> "LayerNorm":
        """Its result times ``factor``."""
        return LayerNorm(self.weight * factor, None if self.bias is None else self.bias * factor)


Norm = Tensor | LayerNorm
