"""The dense MLPs, with gate and without."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.models.config import DecoderConfig
from squall.models.linear import Linear
from squall.models.norm import Norm
from squall.models.weights import WeightSource, read_linear


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": _relu2,
}


class XIELU:
    """xIELU (Huang 2024, arXiv:2411.13010), with two learned slopes; those stored are behind a
    softplus."""

    BETA, LEAST = 0.5, -1e-6  # checkpoints repeat them

    def __init__(self, source: WeightSource, prefix: str) -> None:
        slopes = (source.vector(f"{prefix}.act_fn.alpha_{sign}", 1) for sign in "pn")
        self.positive, self.negative = (F.softplus(slope.float()) for slope in slopes)
        for name in ("beta", "eps"):
            source.skip(f"{prefix}.act_fn.{name}")

    def __call__(self, x: Tensor) -> Tensor:
        z = x.float()
        right = self.positive * z.square()
        left = (torch.expm1(z.clamp(max=self.LEAST)) - z) * (self.BETA + self.negative)
        return (torch.where(z > 0, right, left) + self.BETA * z).to(x.dtype)


class GatedMLP:
    """``down(act(gate(x)) * up(x))`` of ``x``, the norm of the stream."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        names, sizes = ["gate", "up"], [inner, inner]
        if config.fused_gate_up:
            names, sizes = ["gate_up"], [2 * inner]
        names = [f"{prefix}.{name}_proj" for name in names]
        self.gate_up = read_linear(source, names, sizes, hidden, bias)
        self.down = read_linear(source, [f"{prefix}.down_proj"], [hidden], inner, bias)
        self.activation = config.activation

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Tensor:
        """What goes into ``down``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return self.gate_up.of_norm(stream, norm, eps, self.activation)

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return self.gate_up, self.down


class PlainMLP:
    """``down(act(up(x)))`` of ``x``, the norm of the stream."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        assert config.plain_mlp is not None
        xielu = config.activation == "xielu"
        self.activation = XIELU(source, prefix) if xielu else _PLAIN[config.activation]
        up, down = (f"{prefix}.{name}" for name in config.plain_mlp)
        self.up = read_linear(source, [up], [inner], hidden, bias)
        self.down = read_linear(source, [down], [hidden], inner, bias)

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Tensor:
        """What goes into ``down``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return self.activation(self.up.of_norm(stream, norm, eps))

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return self.up, self.down
