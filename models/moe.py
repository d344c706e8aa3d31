"""A mixture of experts in place of the MLP."""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.moe.experts import Experts, Routed
from squall.kernels.moe.route import route
from squall.models.config import DecoderConfig, MoEConfig
from squall.models.linear import Linear
from squall.models.mlp import GatedMLP
from squall.models.norm import Norm, normed
from squall.models.weights import WeightSource, read_linear


class Inner(NamedTuple):
    """What goes into the experts, and into ``out`` of the MLP that all tokens share."""

    routed: Routed
    shared: Tensor | None


class MoE:
    """``sum over a token's experts of weight * down(act(gate(x)) * up(x))``, plus a shared MLP."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        moe, hidden = config.moe, config.hidden_size
        assert moe is not None
        self.moe: MoEConfig = moe
        self.activation, self.dtype = config.activation, source.dtype
        # A GPU's products of one token normalise it themselves.
        self._fuses_norm = source.device.type != "cpu" and not moe.scaled_input
        assert not moe.scaled_input or moe.router.top_k == 1, "an expert's input is a token's"
        self.router = read_linear(
            source, [f"{prefix}.{moe.gate}"], [moe.experts], hidden, moe.router_bias
        )
        self.correction: Tensor | None = None
        if moe.correction is not None:
            name = f"{prefix}.{moe.correction}"
            self.correction = source.floats(name, moe.correction_shape or (moe.experts,)).view(-1)
        self.experts: Experts = source.experts(f"{prefix}.", moe, hidden)
        self.shared: GatedMLP | None = None
        if moe.shared is not None:
            place = f"{prefix}.{moe.shared}"
            self.shared = GatedMLP(config, source, place, moe.shared_size, moe.shared_names)
        self.shared_gate: Linear | None = None
        if moe.shared_gate is not None:
            gate = [f"{prefix}.{moe.shared_gate}"]
            self.shared_gate = read_linear(source, gate, [1], hidden, False)

    def inner(self, stream: Tensor, norm: Norm | None, eps: float) -> Inner:
        """Choose experts for ``stream [T, hidden]`` float32, and go half of the way through the
        shared MLP."""
        if self._fuses_norm and stream.shape[0] == 1 and isinstance(norm, Tensor):
            weight, bias = self.router.weight, self.router.bias
            logits = weight.norm_linear(stream, norm, eps, bias, "none", torch.float32)
            routed = Routed(stream, norm, eps, *self._choose(logits))
            shared = None if self.shared is None else self.shared.inner(stream, norm, eps)
            if shared is not None and self.shared_gate is not None:
                shared = _gated(shared, self.shared_gate.of_norm(stream, norm, eps))
            return Inner(routed, shared)
        x = normed(stream, norm, eps, self.dtype)
        shared = None if self.shared is None else self.shared.of(x)
        if shared is not None and self.shared_gate is not None:
            shared = _gated(shared, self.shared_gate(x))
        ids, weights = self._choose(self.router.weight.linear(x, self.router.bias, torch.float32))
        if self.moe.scaled_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        return Inner(Routed(x, None, eps, ids, weights), shared)

    def add_to(self, stream: Tensor, inner: Inner) -> None:
        """Add the experts' results to ``stream`` ``[T, hidden]``, in place."""
        self.experts.add_to(stream, inner.routed, self.activation)
        if self.shared is not None and inner.shared is not None:
            self.shared.out.add_to(stream, inner.shared)

    @property
    def out(self) -> "MoE":
        """What adds ``inner`` to the stream, as an MLP's projection does."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all weight matrices."""
        shared = 0 if self.shared is None else self.shared.nbytes
        return self.router.nbytes + self.experts.nbytes + shared

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, ``[T, k]`` each."""
        r = self.moe.router
        return route(
            logits, self.correction, r.top_k, r.scoring, r.renormalize, r.scale, r.groups,
            r.top_groups, r.group_best, r.jitter,
        )  # fmt: skip


def _gated(inner: Tensor, logit: Tensor) -> Tensor:
    """``inner [T, F]`` times the sigmoid of ``logit [T, 1]``."""
    return inner * logit.float().sigmoid().to(inner.dtype)
