"""``Linear``: a projection made of one or more weights side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from squall.kernels.weight import Weight, merge


class Linear:
    """``x [..., in] -> [..., out]``, plus a bias.

    ``weights`` are stacked along the output (q, k, v or gate, up); the multiplication is the
    weight's own business.
    """

    def __init__(self, weights: Sequence[Weight], bias: Tensor | None = None) -> None:
        self.weights = merge(weights)
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights) + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.weights) == 1:
            y = self.weights[0].matmul(x)
        else:
            y = torch.cat([weight.matmul(x) for weight in self.weights], dim=-1)
        return y if self.bias is None else y + self.bias
