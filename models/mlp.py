"""The dense MLPs, with gate and without."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.models.config import DecoderConfig
from squall.models.norm import Norm
from squall.models.weights import WeightSource, read_linear


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": _relu2,
}


class XIELU:
    """xIELU (Huang 2024, arXiv:2411.13010), with two learned slopes, stored as what goes into a
    softplus."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        slopes = (source.floats(f"{prefix}.act_fn.alpha_{sign}", (1,)) for sign in "pn")
        self.positive, self.negative = map(F.softplus, slopes)
        self.beta = source.floats(f"{prefix}.act_fn.beta", ())
        self.least = source.floats(f"{prefix}.act_fn.eps", ())

    def __call__(self, x: Tensor) -> Tensor:
        z = x.float()
        right = self.positive * z.square()
        left = (torch.expm1(torch.minimum(z, self.least)) - z) * (self.beta + self.negative)
        return (torch.where(z > 0, right, left) + self.beta * z).to(x.dtype)


class GatedMLP:
    """``down(act(gate(x)) * up(x))`` of ``x``, the norm of the stream."""

    def __init__(
        self,
        config: DecoderConfig,
        source: WeightSource,
        prefix: str,
        size: int | None = None,
        names: tuple[tuple[str, ...], str] | None = None,
    ) -> None:
        """``size`` instead of the config's intermediate size; ``names`` of gate and up, or of both
        as one, and of down, instead of the usual ones."""
        hidden, inner, bias = config.hidden_size, size or config.intermediate_size, config.mlp_bias
        usual = ("gate_up_proj",) if config.fused_gate_up else ("gate_proj", "up_proj")
        ups, down = names or (usual, "down_proj")
        sizes = [2 * inner // len(ups)] * len(ups)
        self.gate_up = read_linear(source, [f"{prefix}.{up}" for up in ups], sizes, hidden, bias)
        self.out = read_linear(source, [f"{prefix}.{down}"], [hidden], inner, bias)
        self.activation = config.activation

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Tensor:
        """What goes into ``out``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return self.gate_up.of_norm(stream, norm, eps, self.activation)

    def of(self, x: Tensor) -> Tensor:
        """``inner`` of the norm itself, ``[T, hidden]`` in the model's dtype."""
        return ACTIVATIONS[self.activation](self.gate_up(x))

    @property
    def nbytes(self) -> int:
        """Bytes of both weight matrices."""
        return self.gate_up.nbytes + self.out.nbytes


class PlainMLP:
    """``down(act(up(x)))`` of ``x``, the norm of the stream."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        assert config.plain_mlp is not None
        xielu = config.activation == "xielu"
        self.activation = XIELU(source, prefix) if xielu else _PLAIN[config.activation]
        up, down = (f"{prefix}.{name}" for name in config.plain_mlp)
        self.up = read_linear(source, [up], [inner], hidden, bias)
        self.out = read_linear(source, [down], [hidden], inner, bias)

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Tensor:
        """What goes into ``out``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return self.activation(self.up.of_norm(stream, norm, eps))

    @property
    def nbytes(self) -> int:
        """Bytes of both weight matrices."""
        return self.up.nbytes + self.out.nbytes
