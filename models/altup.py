"""Gemma 3n's decoder: N residual streams of which each layer computes one and predicts the others
(AltUp, Baykal et al. 2023, arXiv:2301.13310), low-rank residuals beside attention (LAuReL), an
embedding of the token for each layer, and MLPs most of whose gates are closed.

``T`` tokens, ``N`` streams, ``H`` hidden size, ``P`` size of a layer's token embedding. Streams are
float32 ``[T, N, H]``. Formulas: transformers' ``modeling_gemma3n``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.rmsnorm import rms_norm, rms_norm_add
from squall.models.batch import Batch, KVCache
from squall.models.config import DecoderConfig
from squall.models.decoder import Block, Decoder
from squall.models.linear import Linear
from squall.models.mlp import GatedMLP
from squall.models.weights import WeightSource, read_linear

_LEAST_SQUARE = 1e-5  # a smaller mean square of a stream is taken for this


class AltUp:
    """Predicts every stream from all of them, and corrects the predictions by what the layer made
    of the active one."""

    def __init__(self, config: DecoderConfig, source: WeightSource, prefix: str) -> None:
        assert config.altup is not None
        hidden, count = config.hidden_size, config.altup.streams
        self.active, self.hidden, self.eps = config.altup.active, hidden, config.norm_eps
        self.router = read_linear(source, [f"{prefix}.modality_router"], [count], hidden, False)
        self.router_norm = source.norm(f"{prefix}.router_norm.weight", hidden, config.norm_offset)

        def small(name: str, rows: int) -> Tensor:
            weight = source.matrix(f"{prefix}.{name}.weight", rows, count)
            return weight.rows(torch.arange(rows, device=source.device), torch.float32)

        self.prediction = small("prediction_coefs", count**2)
        self.correction = small("correction_coefs", count)
        scale = source.vector(f"{prefix}.correct_output_scale", hidden).float()
        self.scale = scale if config.altup.scaled else None

    def _modalities(self, x: Tensor) -> Tensor:
        """``[T, H] -> [T, N]``."""
        return torch.tanh(self.router.of_norm(x, self.router_norm, self.eps).float() / self.hidden)

    def predict(self, streams: Tensor) -> Tensor:
        modalities = self._modalities(streams[:, self.active])
        mix = F.linear(modalities, self.prediction).view(-1, *[streams.shape[1]] * 2)
        return torch.baddbmm(streams, mix, streams)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """``activated`` [T, H]: the active stream as the layer made it."""
        weights = F.linear(self._modalities(activated), self.correction) + 1
        innovation = activated - predictions[:, self.active]
        return torch.addcmul(predictions, weights[:, :, None], innovation[:, None])


class AltUpBlock(Block):
    """One layer."""

    def __init__(self, config: DecoderConfig, index: int, source: WeightSource) -> None:
        assert config.altup is not None
        own = replace(config, intermediate_size=config.altup.intermediate_sizes[index])
        prefix = f"model.layers.{index}"
        super().__init__(own, config.layers[index], source, prefix)
        hidden, size, rank = config.hidden_size, config.altup.input_size, config.altup.laurel_rank

        def linear(name: str, rows: int, columns: int) -> Linear:
            return read_linear(source, [f"{prefix}.{name}"], [rows], columns, False)

        def norm(name: str) -> Tensor:
            return source.norm(f"{prefix}.{name}.weight", hidden, config.norm_offset)

        self.dtype = source.dtype
        self.altup = AltUp(config, source, f"{prefix}.altup")
        self.laurel_left = linear("laurel.linear_left", rank, hidden)
        self.laurel_right = linear("laurel.linear_right", hidden, rank)
        self.laurel_norm = norm("laurel.post_laurel_norm")
        self.input_gate = linear("per_layer_input_gate", size, hidden)
        self.input_projection = linear("per_layer_projection", hidden, size)
        self.after_input_norm = norm("post_per_layer_input_norm")
        sparsity = config.altup.sparsity[index]
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        laurel = self.laurel_left, self.laurel_right
        return *laurel, self.input_gate, self.input_projection, self.altup.router

    def carry(
        self,
        streams: Tensor,
        inputs: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """``streams`` after this layer, of all tokens or of ``rows`` (int [L]); ``inputs`` [T, P]
        are the tokens' embeddings for this layer."""
        predictions = self.altup.predict(streams)
        active = predictions[:, self.altup.active].clone()
        assert isinstance(self.input_norm, Tensor)
        normed = rms_norm(active, self.input_norm, self.eps, torch.float32)
        mixed = self.attention.mixed(normed, None, batch, cache, rope)
        if rows is not None:
            every = mixed, predictions, active, normed, inputs
            mixed, predictions, active, normed, inputs = (x.index_select(0, rows) for x in every)
        self._add(self.attention.out, mixed, self.post_attention_norm, active)
        active += normed
        low = self.laurel_left.of_norm(normed, None, self.eps)
        rms_norm_add(self.laurel_right(low), self.laurel_norm, self.eps, active)
        active *= math.sqrt(0.5)
        self._add(self.mlp.out, self._inner(active), self.post_mlp_norm, active)
        streams = self.altup.correct(predictions, active)
        streams[:, 1:] += self._token_input(streams, inputs)[:, None]
        return streams

    def _inner(self, stream: Tensor) -> Tensor:
        """What goes into the MLP's ``out``. Of a sparse MLP only those gates pass that are so many
        deviations above their mean as closes its share of them, if they are normally distributed.
        """
        assert isinstance(self.mlp, GatedMLP)
        if self.deviations is None:
            return self.mlp.inner(stream, self.mlp_norm, self.eps)
        x = self.mlp.gate_up.of_norm(stream, self.mlp_norm, self.eps)
        gate, up = x.float().chunk(2, -1)
        deviation, mean = torch.std_mean(gate, -1, correction=0, keepdim=True)
        gate = F.relu(gate - mean - deviation * self.deviations)
        return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)

    def _token_input(self, streams: Tensor, inputs: Tensor) -> Tensor:
        """What the token's embedding adds to all streams but the first, float32 ``[T, H]``."""
        active = streams[:, self.altup.active]
        if self.altup.scale is not None:
            active = active * self.altup.scale
        gate = F.gelu(self.input_gate(active.to(self.dtype)).float(), approximate="tanh")
        added = self.input_projection((gate * inputs).to(self.dtype))
        return rms_norm(added, self.after_input_norm, self.eps, torch.float32)


class AltUpDecoder(Decoder):
    """The decoder of a config with ``altup``."""

    def __init__(self, config: DecoderConfig, source: WeightSource, max_len: int) -> None:
        super().__init__(config, source, max_len)
        assert config.altup is not None
        self.altup = altup = config.altup
        hidden, layers = config.hidden_size, config.num_layers
        inputs, others = layers * altup.input_size, range(altup.streams - 1)
        self.input_embedding = source.matrix(
            "model.embed_tokens_per_layer.weight", altup.input_vocab, inputs
        )
        self.input_projection = read_linear(
            source, ["model.per_layer_model_projection"], [inputs], hidden, False
        )
        self.input_norm = source.norm(
            "model.per_layer_projection_norm.weight", altup.input_size, config.norm_offset
        )
        names = [f"model.altup_projections.{i}" for i in others]
        self.opening = read_linear(source, names, [hidden] * len(names), hidden, False)
        self.closing = [
            read_linear(source, [f"model.altup_unembed_projections.{i}"], [hidden], hidden, False)
            for i in others
        ]

    def _read_blocks(self, source: WeightSource) -> Sequence[Block]:
        self.layers = [AltUpBlock(self.config, i, source) for i in range(self.config.num_layers)]
        return self.layers

    @property
    def nbytes(self) -> int:
        linears = [linear for block in self.layers for linear in block.linears]
        outer = *linears, self.input_projection, self.opening, *self.closing
        return super().nbytes + self.input_embedding.nbytes + sum(x.nbytes for x in outer)

    def _carry(self, stream: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        streams, inputs = self._open(stream), self._inputs(stream, batch.token_ids)
        last = len(self.layers) - 1
        for i, (block, memory) in enumerate(
            zip(self.layers, self._memory(batch, cache), strict=True)
        ):
            rows = batch.logit_rows if i == last else None
            streams = block.carry(streams, inputs[:, i], *memory, rows)
        return self._close(streams)

    def _inputs(self, stream: Tensor, ids: Tensor) -> Tensor:
        """The tokens' embeddings for each layer, float32 ``[T, layers, P]``."""
        size = self.altup.input_size
        known = ids.where(ids < self.altup.input_vocab, 0)
        own = self.input_embedding.rows(known, self.dtype).float() * math.sqrt(size)
        common = self.input_projection(stream.to(self.dtype)).float().view(-1, size)
        common *= self.config.hidden_size**-0.5
        common = rms_norm(common, self.input_norm, self.config.norm_eps, torch.float32)
        return ((common.view(own.shape) + own) * math.sqrt(0.5)).view(len(ids), -1, size)

    def _open(self, stream: Tensor) -> Tensor:
        """The streams of the embeddings ``[T, H]``: they, and projections as large as they are."""
        others = self.opening(stream.to(self.dtype)).float().view(len(stream), -1, stream.shape[1])
        return torch.cat((stream[:, None], _as_large(others, stream[:, None])), 1)

    def _close(self, streams: Tensor) -> Tensor:
        """The mean of the first stream and of projections of the others as large: ``[L, H]``."""
        first, *others = streams.unbind(1)
        projected = [p(x.to(self.dtype)).float() for p, x in zip(self.closing, others, strict=True)]
        return torch.stack((first, *(_as_large(x, first) for x in projected))).mean(0)


def _as_large(x: Tensor, model: Tensor) -> Tensor:
    """``x`` with the mean square of ``model``, over the last dimension."""
    square, wanted = (y.square().mean(-1, keepdim=True) for y in (x, model))
    return x * (wanted / square.clamp(min=_LEAST_SQUARE)).sqrt()
