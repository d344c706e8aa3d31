"""The dense gated MLP."""

from torch import Tensor

from squall.models.config import DecoderConfig
from squall.models.weights import WeightSource, read_linear


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

    def inner(self, stream: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        """What goes into ``down``: ``[T, hidden]`` float32 -> ``[T, intermediate]``."""
        return self.gate_up.of_norm(stream, norm, eps, self.activation)
