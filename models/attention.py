"""Grouped-query attention over the paged KV cache."""

from torch import Tensor

from squall.kernels.attention.paged import paged_attention
from squall.kernels.attention.store_kv import store_kv
from squall.kernels.rmsnorm import rms_norm
from squall.kernels.rope import apply_rope
from squall.models.batch import Batch
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.weights import WeightSource, read_linear


class Attention:
    """``x [T, hidden] -> [T, hidden]``; writes this step's keys and values into the cache."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, source: WeightSource, prefix: str
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.scale = config.attention_scale
        self.window = layer.window
        self.softcap = config.attention_softcap
        self.eps = config.norm_eps
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = read_linear(
            source,
            [f"{prefix}.{name}_proj" for name in "qkv"],
            [q_size, kv_size, kv_size],
            config.hidden_size,
            config.qkv_bias,
        )
        self.out = read_linear(
            source, [f"{prefix}.o_proj"], [config.hidden_size], q_size, config.o_bias
        )
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        if config.qk_norm:
            offset = config.norm_offset
            self.q_norm = source.norm(f"{prefix}.q_norm.weight", self.head_dim, offset)
            self.k_norm = source.norm(f"{prefix}.k_norm.weight", self.head_dim, offset)

    def __call__(
        self, x: Tensor, batch: Batch, cache: tuple[Tensor, Tensor], rope: Tensor
    ) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, self.eps)
            k = rms_norm(k, self.k_norm, self.eps)
        q, k = apply_rope(q, k, batch.positions, rope)
        store_kv(k, v, *cache, batch.slots)
        mixed = paged_attention(
            q,
            *cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            batch.max_query_len,
            batch.max_context_len,
            self.scale,
            self.window,
            self.softcap,
        )
        return self.out(mixed.view(x.shape[0], -1))
