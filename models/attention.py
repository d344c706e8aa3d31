"""Grouped-query attention over the paged KV cache."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.decode_step import decode_attention
from squall.kernels.attention.paged import paged_attention
from squall.kernels.attention.prompt import prefill_attention
from squall.kernels.attention.rope_store import rope_store_kv
from squall.models.batch import Batch
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.linear import Linear
from squall.models.norm import Norm
from squall.models.qk_norm import read_qk_norm
from squall.models.rope import halves_first
from squall.models.weights import WeightSource, read_linear

Attend = Callable[..., Tensor]  # takes what ``paged_attention`` takes


class Attention:
    """Mixes values over the tokens of each sequence; ``out`` projects back to the stream.

    RMS norms behind the rope (``qk_norm_after_rope``) are norms without weights before it, which
    rotations leave alone, and one weight: a score is the sum of q_d k_d over the elements, so q
    takes both weights and k none.
    """

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, source: WeightSource, prefix: str
    ) -> None:
        self.scale = config.attention_scale
        self.window = layer.window
        self.softcap = config.attention_softcap
        self.eps = config.norm_eps
        self.clip = config.qkv_clip
        self.attend: Attend | None = None  # what the user chose instead of what is fastest
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        names, sizes = ["q", "k", "v"], [q_size, kv_size, kv_size]
        orders: list[Tensor | None] = [None, None, None]
        rotary = config.ropes[layer.rope].dim
        if config.interleaved_rope:
            heads = config.num_heads, config.num_kv_heads
            orders[:2] = (halves_first(n, config.head_dim, rotary, source.device) for n in heads)
        self.shares = layer.shares is not None
        if self.shares:
            names, sizes, orders = ["q"], [q_size], orders[:1]
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
                source.skip(f"{prefix}.{name}")
        elif config.fused_qkv:
            names, sizes, orders = ["qkv"], [sum(sizes)], [None]
        names = [f"{prefix}.{name}_proj" for name in names]
        self.qkv = read_linear(source, names, sizes, config.hidden_size, config.qkv_bias, orders)
        self.out = read_linear(
            source,
            [f"{prefix}.{config.attention_out}"],
            [config.hidden_size],
            q_size,
            config.o_bias,
        )
        q_name, k_name = (f"{prefix}.{name}" for name in config.qk_norm_names)
        self.qk_norm = (
            None if self.shares else read_qk_norm(config, source, (q_name, k_name), rotary)
        )
        self.growth = layer.query_growth
        self.q_size, self.kv_size = q_size, kv_size
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        self.sinks: Tensor | None = None
        if config.sinks:
            self.sinks = source.floats(f"{prefix}.sinks", (config.num_heads,))
        self.q_factor: Tensor | None = None  # float32 [head_dim], of every turned head of q
        if config.qk_norm:
            offset = config.norm_offset
            self.q_norm = source.norm(f"{q_name}.weight", config.head_dim, offset)
            if not self.shares:
                self.k_norm = source.norm(f"{k_name}.weight", config.head_dim, offset)
        if config.qk_norm_after_rope:
            assert self.q_norm is not None
            assert self.k_norm is not None
            self.q_factor = self.q_norm * self.k_norm
            self.q_norm = self.k_norm = torch.ones_like(self.q_norm)
        if layer.unit_qk_norm:
            self.q_norm = self.k_norm = torch.ones(config.head_dim, device=source.device)
        assert self.growth is None or self.q_norm is None, "a norm would undo the growth of q"

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out

    def mixed(
        self,
        stream: Tensor,
        norm: Norm | None,
        batch: Batch,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
    ) -> Tensor:
        """What goes into ``out``: ``[T, hidden]`` float32 -> ``[T, heads * head_dim]``. Writes this
        step's keys and values into the cache, unless the layer shares those of another."""
        qkv = self.qkv.of_norm(stream, norm, self.eps)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)
        slots = batch.slots
        growth = self.growth
        if growth is not None and batch.max_context_len + growth.ahead > growth.every:
            steps = torch.floor((batch.positions + growth.ahead) / growth.every)
            qkv[:, : self.q_size] *= (1 + growth.beta * torch.log1p(steps))[:, None]
        if self.shares:  # turns q alone
            qkv, slots = F.pad(qkv, (0, 2 * self.kv_size)), torch.full_like(slots, -1)
        rotary = self.q_norm, self.k_norm, self.eps, batch.positions, rope, *cache, slots
        limits = self.scale, self.window, self.softcap, self.sinks
        index = batch.block_tables, batch.query_start, batch.context_lens
        longest = batch.max_query_len, batch.max_context_len
        fused = self.attend is None and self.q_factor is None and not self.shares
        if fused and batch.max_query_len == 1:
            mixed = decode_attention(qkv, *rotary, *index, batch.max_context_len, *limits)
            return mixed.view(stream.shape[0], -1)
        q = rope_store_kv(qkv, *rotary)
        if self.q_factor is not None:
            q *= self.q_factor
        if self.attend is not None:
            mixed = self.attend(q, *cache, *index, *longest, *limits)
        elif batch.query_lens and batch.max_query_len > 1:
            lengths = batch.query_lens, batch.contexts
            mixed = prefill_attention(q, *cache, *index, *lengths, *limits)
        else:
            mixed = paged_attention(q, *cache, *index, *longest, *limits)
        return mixed.view(stream.shape[0], -1)
