"""A mixture of experts in place of the MLP."""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.moe.combine import combine_experts
from squall.kernels.moe.route import route
from squall.kernels.moe.stack import ExpertStack, Routing
from squall.models.config import DecoderConfig, MoEConfig
from squall.models.linear import Linear
from squall.models.mlp import GatedMLP
from squall.models.norm import Norm, normed
from squall.models.weights import WeightSource, read_linear


class Routed(NamedTuple):
    """What goes into the experts' ``down``: ``hidden [T * k, intermediate]``, and into that of the
    MLP that all tokens share, ``[T, shared_size]``."""

    hidden: Tensor
    routing: Routing
    shared: Tensor | None


class MoE:
    """``sum over a token's experts of weight * down(act(gate(x)) * up(x))``, plus a shared MLP."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        moe, hidden = config.moe, config.hidden_size
        assert moe is not None
        self.moe: MoEConfig = moe
        self.activation, self.dtype = config.activation, source.dtype
        self.router = read_linear(
            source, [f"{prefix}.{moe.gate}"], [moe.experts], hidden, moe.router_bias
        )
        self.correction: Tensor | None = None
        if moe.correction is not None:
            name = f"{prefix}.{moe.correction}"
            self.correction = source.floats(name, moe.correction_shape or (moe.experts,)).view(-1)
        names = [f"{prefix}.{name}" for name in moe.gate_up]
        inner, order = moe.intermediate_size, (moe.transposed, moe.interleaved)
        self.gate_up: ExpertStack = source.experts(
            names, moe.experts, 2 * inner // len(names), hidden, *order
        )
        self.down: ExpertStack = source.experts(
            [f"{prefix}.{moe.down}"], moe.experts, hidden, inner, moe.transposed, False
        )
        self.gate_up_bias: Tensor | None = None
        self.down_bias: Tensor | None = None
        if moe.biases is not None:
            up, down = (f"{prefix}.{name}" for name in moe.biases)
            self.gate_up_bias = source.expert_bias(up, moe.experts, 2 * inner, moe.interleaved)
            self.down_bias = source.expert_bias(down, moe.experts, hidden, False)
        self.shared: GatedMLP | None = None
        if moe.shared is not None:
            self.shared = GatedMLP(config, source, f"{prefix}.{moe.shared}", moe.shared_size)
        self.shared_gate: Linear | None = None
        if moe.shared_gate is not None:
            gate = [f"{prefix}.{moe.shared_gate}"]
            self.shared_gate = read_linear(source, gate, [1], hidden, False)

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Routed:
        """Route tokens and go half of the way: ``[T, hidden]`` float32 -> what ``add_to`` takes."""
        x, moe = normed(stream, norm, eps, self.dtype), self.moe
        ids, weights = self._route(x)
        shared = self._shared(x) if self.shared is not None else None
        if moe.scaled_input:
            x = (x.unsqueeze(1) * weights.unsqueeze(2).to(x.dtype)).view(-1, x.shape[1])
            weights = torch.ones_like(weights)
        routing = Routing(ids, weights, moe.experts)
        hidden = self.gate_up.multiply(x, routing, self.gate_up_bias, self.activation)
        return Routed(hidden, routing, shared)

    def add_to(self, stream: Tensor, routed: Routed) -> None:
        """Add the experts' results to ``stream`` ``[T, hidden]``, in place."""
        y = self.down.multiply(routed.hidden, routed.routing, self.down_bias, "none")
        combine_experts(y, routed.routing.weights, stream)
        if self.shared is not None and routed.shared is not None:
            self.shared.out.add_to(stream, routed.shared)

    @property
    def out(self) -> "MoE":
        """What adds ``inner`` to the stream, as an MLP's projection does."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all weight matrices."""
        shared = 0 if self.shared is None else self.shared.nbytes
        return self.router.nbytes + self.gate_up.nbytes + self.down.nbytes + shared

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.moe.router
        logits = self.router.weight.linear(x, self.router.bias, torch.float32)
        return route(
            logits, self.correction, r.top_k, r.scoring, r.renormalize, r.scale, r.groups,
            r.top_groups, r.group_best, r.jitter,
        )  # fmt: skip

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        inner = self.shared.of(x)
        if self.shared_gate is None:
            return inner
        return inner * self.shared_gate(x).float().sigmoid().to(inner.dtype)
