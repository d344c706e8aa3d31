"""The dense MLPs, with gate and without."""

from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.models.config import DecoderConfig
from squall.models.norm import Norm
from squall.models.weights import WeightSource, read_linear


class GatedMLP:
    """``down(act(gate(x)) * up(x))`` of ``x``, the norm of the stream."""

    def __init__(
        self, config: DecoderConfig, source: WeightSource, prefix: str, size: int | None = None
    ) -> None:
        """``size`` instead of the config's intermediate size."""
        hidden, inner, bias = config.hidden_size, size or config.intermediate_size, config.mlp_bias
        names, sizes = ["gate", "up"], [inner, inner]
        if config.fused_gate_up:
            names, sizes = ["gate_up"], [2 * inner]
        names = [f"{prefix}.{name}_proj" for name in names]
        self.gate_up = read_linear(source, names, sizes, hidden, bias)
        self.out = read_linear(source, [f"{prefix}.down_proj"], [hidden], inner, bias)
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
    """``down(gelu_tanh(up(x)))`` of ``x``, the norm of the stream."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        assert config.plain_mlp is not None
        assert config.activation == "gelu_tanh", config.activation
        up, down = (f"{prefix}.{name}" for name in config.plain_mlp)
        self.up = read_linear(source, [up], [inner], hidden, bias)
        self.out = read_linear(source, [down], [hidden], inner, bias)

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Tensor:
        """What goes into ``out``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return F.gelu(self.up.of_norm(stream, norm, eps), approximate="tanh")

    @property
    def nbytes(self) -> int:
        """Bytes of both weight matrices."""
        return self.up.nbytes + self.out.nbytes
