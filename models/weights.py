"""``WeightSource``: where a model under construction gets its weights.

Building a model is loading it: each block asks the source for its tensors by their Hugging Face
names. Sources exist for model files (``squall.loaders.load``) and for random weights.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from squall.kernels.moe.experts import DenseExperts, Experts
from squall.kernels.weight import DenseWeight, Weight
from squall.models.config import DecoderConfig, MoEConfig
from squall.models.linear import Linear
from squall.models.norm import LayerNorm, Norm


class WeightSource(Protocol):
    """Hands out weights on ``device``; vectors and dense matrices come in ``dtype``.

    Every method raises ``ModelLoadError`` naming the tensor when it is missing or misshapen.
    """

    dtype: torch.dtype
    device: torch.device

    def vector(self, name: str, size: int) -> Tensor:
        """``[size]`` in ``dtype``, a bias for example."""
        ...

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        """``[size]`` float32 norm weight; ``offset`` is what the checkpoint's convention leaves
        out (Gemma stores w - 1), which GGUF files already contain."""
        ...

    def head_norms(self, name: str, heads: int, dim: int) -> Tensor:
        """``[heads, dim]`` float32 norm weights of module ``name``, a row for each head."""
        ...

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight: ...

    def skip(self, name: str) -> None:
        """A tensor that files may have and the model does not use."""
        ...

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small dense tensor, float32."""
        ...

    def experts(self, prefix: str, moe: MoEConfig, hidden: int) -> Experts:
        """The experts of a layer; ``prefix`` stands before the names in ``moe``."""
        ...


def read_linear(
    source: WeightSource,
    names: Sequence[str],
    outs: Sequence[int],
    in_features: int,
    bias: bool,
    orders: Sequence[Tensor | None] | None = None,
) -> Linear:
    """The projection ``names`` (modules, without ``.weight``) stacked along the output; ``orders``
    are the rows to take of each, None for all as they are."""
    parts = list(zip(names, outs, orders or [None] * len(names), strict=True))
    weights, biases = [], []
    for name, out, order in parts:
        weight = source.matrix(f"{name}.weight", out, in_features)
        weights.append(weight if order is None else weight.select(order))
    if not bias:
        return Linear(weights, source.dtype)
    for name, out, order in parts:
        vector = source.vector(f"{name}.bias", out)
        biases.append(vector if order is None else vector[order])
    return Linear(weights, source.dtype, torch.cat(biases))


def read_norm(source: WeightSource, config: DecoderConfig, name: str) -> Norm:
    """A norm over the hidden size; ``name`` is that of the module."""
    if config.plain_norms:
        return LayerNorm(torch.ones(config.hidden_size, device=source.device), None)
    weight = source.norm(f"{name}.weight", config.hidden_size, config.norm_offset)
    if not config.layer_norm:
        return weight
    biased = config.norm_bias
    bias = source.vector(f"{name}.bias", config.hidden_size).float() if biased else None
    return LayerNorm(weight, bias)


class RandomWeights:
    """Normal random dense weights of the right shapes, for benchmarks and profiling."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def _normal(self, *shape: int) -> Tensor:
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0, 0.02, generator=self._generator)

    def vector(self, name: str, size: int) -> Tensor:
        return self._normal(size)

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        return torch.ones(size, device=self.device)

    def head_norms(self, name: str, heads: int, dim: int) -> Tensor:
        return torch.ones(heads, dim, device=self.device)

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        return DenseWeight(self._normal(out_features, in_features))

    def skip(self, name: str) -> None:
        pass

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._normal(*shape).float()

    def experts(self, prefix: str, moe: MoEConfig, hidden: int) -> Experts:
        count, inner = moe.experts, moe.intermediate_size
        gate_up, down = self._normal(count, 2 * inner, hidden), self._normal(count, hidden, inner)
        biases: list[Tensor | None] = [None, None]
        if moe.biases is not None:
            biases = [self._normal(count, rows) for rows in (2 * inner, hidden)]
        return DenseExperts(gate_up, biases[0], down, biases[1])
