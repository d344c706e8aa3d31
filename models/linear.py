"""``Linear``: a projection made of one or more weights side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.weight import Weight, merge
from squall.models.norm import LayerNorm, Norm, normed


class Linear:
    """``[T, in] -> [T, out]``, plus a bias, in the ways a decoder layer uses a projection.

    ``weights`` are stacked along the output (q, k, v or gate, up); the multiplication is the
    weight's own business. ``dtype`` is the model's.
    """

    def __init__(
        self, weights: Sequence[Weight], dtype: torch.dtype, bias: Tensor | None = None
    ) -> None:
        self.weight = merge(weights)
        self.dtype = dtype
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias, self.dtype)

    def of_norm(
        self, stream: Tensor, norm: Norm | None, eps: float, activation: str = "none"
    ) -> Tensor:
        """The projection of the norm of the float32 ``stream``, or without ``norm`` of the stream
        itself; ``activation`` as ``Weight.norm_linear`` takes it."""
        if norm is None or isinstance(norm, LayerNorm):
            return ACTIVATIONS[activation](self(normed(stream, norm, eps, self.dtype)))
        return self.weight.norm_linear(stream, norm, eps, self.bias, activation, self.dtype)

    def add_to(self, stream: Tensor, x: Tensor) -> None:
        """Add the projection of ``x`` to ``stream``, in place."""
        self.weight.linear_add(x, self.bias, stream)
