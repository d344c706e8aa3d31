"""The dense gated MLP."""

from torch import Tensor

from squall.kernels.activation import gelu_tanh_mul, silu_mul
from squall.models.config import DecoderConfig
from squall.models.weights import WeightSource, read_linear

_ACTIVATIONS = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}


class GatedMLP:
    """``down(act(gate(x)) * up(x))``, ``[T, hidden] -> [T, hidden]``."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = read_linear(source, names, [inner, inner], hidden, bias)
        self.down = read_linear(source, [f"{prefix}.down_proj"], [hidden], inner, bias)
        self.activation = _ACTIVATIONS[config.activation]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))
