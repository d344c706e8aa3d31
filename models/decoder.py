"""The decoder-only transformer, assembled from a :class:`DecoderConfig`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from squall.kernels.rmsnorm import rms_norm_add
from squall.kernels.weight import Weight
from squall.models.attention import Attend, Attention
from squall.models.batch import Batch, KVCache
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.linear import Linear
from squall.models.mla import LatentAttention
from squall.models.mlp import GatedMLP, PlainMLP
from squall.models.moe import MoE
from squall.models.norm import LayerNorm, Norm, normed
from squall.models.rope import rope_table
from squall.models.weights import WeightSource, read_norm

FeedForward = GatedMLP | PlainMLP | MoE


class Block:
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, source: WeightSource, prefix: str
    ) -> None:
        def norm(name: str | None) -> Norm | None:
            return None if name is None else read_norm(source, config, f"{prefix}.{name}")

        self.eps = config.norm_eps
        names = config.norms
        self.input_norm = norm(names.attention)
        attention = LatentAttention if config.mla else Attention
        self.attention: Attention | LatentAttention = attention(
            config, layer, source, f"{prefix}.self_attn"
        )
        self.mlp: FeedForward = (
            MoE(config, source, prefix)
            if layer.experts
            else (PlainMLP if config.plain_mlp else GatedMLP)(
                config, source, f"{prefix}.{config.mlp_name}"
            )
        )
        self.parallel = config.parallel
        self.mlp_norm = norm(names.mlp)
        self.post_attention_norm = norm(names.after_attention)
        self.post_mlp_norm = norm(names.after_mlp)

    def __call__(
        self,
        stream: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Carry ``stream`` [T, hidden] float32 through this layer, in place, and return it. With
        ``rows`` (int [L]) only these are carried to the end and returned, [L, hidden]."""
        mixed = self.attention.mixed(stream, self.input_norm, batch, cache, rope)
        if rows is not None:
            mixed, stream = mixed.index_select(0, rows), stream.index_select(0, rows)
        if self.parallel:
            inner: Any = self.mlp.inner(stream, self.mlp_norm, self.eps)
            self._add(self.attention.out, mixed, self.post_attention_norm, stream)
        else:
            self._add(self.attention.out, mixed, self.post_attention_norm, stream)
            inner = self.mlp.inner(stream, self.mlp_norm, self.eps)
        self._add(self.mlp.out, inner, self.post_mlp_norm, stream)
        return stream

    def _add(self, projection: Linear | MoE, x: Any, norm: Norm | None, stream: Tensor) -> None:
        if norm is None:
            projection.add_to(stream, x)
        else:
            assert isinstance(norm, Tensor), "layer norms behind attention and MLP"
            assert isinstance(projection, Linear), "norms behind experts"
            rms_norm_add(projection(x), norm, self.eps, stream)


class Decoder:
    """Token ids in, logits out.

    ``max_len`` is the longest sequence (tokens) the rotary tables are built for.
    """

    def __init__(self, config: DecoderConfig, source: WeightSource, max_len: int) -> None:
        self.config = config
        self.dtype = source.dtype
        self.device = source.device
        shape = (config.vocab_size, config.hidden_size)
        self.embedding: Weight = source.matrix("model.embed_tokens.weight", *shape)
        self.blocks = self._read_blocks(source)
        norm, scale = read_norm(source, config, config.final_norm), config.logit_scale
        self.norm: Norm = norm * scale if isinstance(norm, Tensor) else norm.scaled(scale)
        self.head = (
            self.embedding if config.tie_embeddings else source.matrix("lm_head.weight", *shape)
        )
        self.head_bias: Tensor | None = None
        if config.head_bias:
            self.head_bias = source.vector("lm_head.bias", config.vocab_size)
        self.ropes = [rope_table(rope, max_len, source.device) for rope in config.ropes]

    def _read_blocks(self, source: WeightSource) -> Sequence[Block]:
        layers = enumerate(self.config.layers)
        return [Block(self.config, layer, source, f"model.layers.{i}") for i, layer in layers]

    def use_attention(self, attend: Attend) -> None:
        """Compute attention with ``attend`` from now on; latent attention has no other way than
        its own."""
        for block in self.blocks:
            assert isinstance(block.attention, Attention), "latent attention"
            block.attention.attend = attend

    @property
    def nbytes(self) -> int:
        """Bytes of the weight matrices; a tied head counts once."""
        blocks = [
            part.nbytes for block in self.blocks for part in (*block.attention.linears, block.mlp)
        ]
        head = 0 if self.head is self.embedding else self.head.nbytes
        return sum(blocks) + self.embedding.nbytes + head

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits of the rows in ``batch.logit_rows``, float32 [L, vocab].

        The residual stream and the logits are float32 whatever the model's dtype: in bf16 the
        stream's rounding would be the largest error of all, and the best tokens of a small model
        would tie.
        """
        config = self.config
        stream = self.embedding.rows(batch.token_ids, self.dtype)
        if config.embedding_scale != 1.0:  # rounded to the model's dtype, as transformers does
            stream = stream * torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        return self.logits(self._carry(stream.float(), batch, cache))

    def _carry(self, stream: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """``stream`` [T, hidden] through all layers: [L, hidden]."""
        *blocks, (last, last_memory) = zip(self.blocks, self._memory(batch, cache), strict=True)
        for block, memory in blocks:
            block(stream, *memory)
        # no other row is needed once the last layer's cache is written
        return last(stream, *last_memory, batch.logit_rows)

    def _memory(
        self, batch: Batch, cache: KVCache
    ) -> list[tuple[Batch, tuple[Tensor, Tensor], Tensor]]:
        """Each layer's view of the batch, its keys and values, and its rotary table."""
        assert len(cache.keys) == self.config.num_caches, f"caches of {len(cache.keys)} layers"
        views = batch.views()
        return [
            (
                views[cache.groups[place]],
                (cache.keys[place], cache.values[place]),
                self.ropes[layer.rope],
            )
            for place, layer in zip(self.config.caches, self.config.layers, strict=True)
        ]

    def logits(self, stream: Tensor) -> Tensor:
        """Final norm and head: ``[L, hidden] -> [L, vocab]``, float32."""
        config, f32 = self.config, torch.float32
        if isinstance(self.norm, LayerNorm):
            x = normed(stream, self.norm, config.norm_eps, self.dtype)
            logits = self.head.linear(x, self.head_bias, f32)
        else:
            norm = self.norm, config.norm_eps
            logits = self.head.norm_linear(stream, *norm, self.head_bias, "none", f32)
        cap = config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits
