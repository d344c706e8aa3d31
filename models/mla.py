"""Multi-head latent attention: the cache holds one latent vector a token instead of keys and values
of every head (DeepSeek-V2, arXiv:2405.04434)."""

import torch
from torch import Tensor

from squall.kernels.attention.mla_decode import mla_decode
from squall.kernels.attention.mla_prefill import mla_prefill
from squall.kernels.attention.mla_query import mla_query
from squall.kernels.rmsnorm import rms_norm
from squall.kernels.weight import DenseWeight
from squall.models.batch import Batch
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.linear import Linear
from squall.models.norm import Norm
from squall.models.rope import halves_first
from squall.models.weights import WeightSource, read_linear

# transformers builds the norms of latents without the config's epsilon.
LATENT_EPS = 1e-6


class LatentAttention:
    """Mixes values over the tokens of each sequence; ``out`` projects back to the stream.

    Decode steps multiply queries with the cached latents as they are (``kv_b`` moved over to the
    queries and to the result); prompts make keys and values of them.
    """

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, source: WeightSource, prefix: str
    ) -> None:
        assert config.mla is not None
        self.sizes = sizes = config.mla
        self.heads = heads = config.num_heads
        self.scale = config.attention_scale
        self.eps = config.norm_eps
        self.head_dim = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        latent = sizes.kv_lora_rank
        offset = config.norm_offset
        self.qkv = _read_inputs(config, source, prefix)
        self.q_b: Linear | None = None
        if sizes.q_lora_rank is not None:
            self.q_norm = source.norm(f"{prefix}.q_a_layernorm.weight", sizes.q_lora_rank, offset)
            names, outs = [f"{prefix}.q_b_proj"], [heads * self.head_dim]
            orders = [_query_order(config, source.device)]
            self.q_b = read_linear(source, names, outs, sizes.q_lora_rank, False, orders)
        self.kv_norm = source.norm(f"{prefix}.kv_a_layernorm.weight", latent, offset)
        rows = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        stored = source.matrix(f"{prefix}.kv_b_proj.weight", rows, latent)
        # Dense: decode steps use it head by head, for which quantised blocks have no kernel.
        every = torch.arange(rows, device=source.device)
        kv_b = DenseWeight(stored.rows(every, source.dtype))
        self.kv_b = kv_b.data.view(heads, -1, latent)
        self.out = read_linear(
            source,
            [f"{prefix}.{config.attention_out}"],
            [config.hidden_size],
            heads * sizes.v_head_dim,
            config.o_bias,
        )
        queries = () if self.q_b is None else (self.q_b,)
        self.linears = (self.qkv, *queries, Linear([kv_b], source.dtype), self.out)

    def mixed(
        self,
        stream: Tensor,
        norm: Norm | None,
        batch: Batch,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
    ) -> Tensor:
        """What goes into ``out``: ``[T, hidden]`` float32 -> ``[T, heads * v_head_dim]``. Writes
        this step's latents into the cache."""
        keys, _ = cache
        q, latent = self._projected(stream, norm)
        turning = self.kv_norm, LATENT_EPS, batch.positions, rope, keys, batch.slots
        index = batch.block_tables, batch.query_start, batch.context_lens
        if batch.max_query_len == 1:
            absorbed = mla_query(q, latent, *turning, self.kv_b)
            values = self.sizes.v_head_dim
            mixed = mla_decode(absorbed, keys, self.kv_b, *index, values, self.scale)
        else:
            q_pe = mla_query(q, latent, *turning, None)
            q = q[..., : self.sizes.qk_nope_head_dim]
            lengths = batch.query_lens or batch.query_start.diff().tolist()
            contexts = batch.contexts or batch.context_lens.tolist()
            mixed = mla_prefill(q, q_pe, self.kv_b, keys, *index, lengths, contexts, self.scale)
        return mixed.flatten(1)

    def _projected(self, stream: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        """Query heads ``[T, H, Dn + R]``, and ``[T, L + R]``: the latents, not normed yet, with the
        part of the keys that is rotated."""
        projected = self.qkv.of_norm(stream, norm, self.eps)
        width = self.sizes.kv_lora_rank + self.sizes.qk_rope_head_dim
        q, latent = projected[:, :-width], projected[:, -width:]
        if self.q_b is not None:
            q = self.q_b(rms_norm(q, self.q_norm, LATENT_EPS, q.dtype))
        return q.view(q.shape[0], self.heads, self.head_dim), latent


def _query_order(config: DecoderConfig, device: torch.device) -> Tensor | None:
    """Rows of the projection to queries, where neighbouring elements are rotated together."""
    sizes = config.mla
    assert sizes is not None
    if not config.interleaved_rope:
        return None
    plain, rotary = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim
    return halves_first(config.num_heads, plain + rotary, rotary, device, plain)


def _read_inputs(config: DecoderConfig, source: WeightSource, prefix: str) -> Linear:
    """What reads the stream: queries (or their latents), then the latents of keys and values. With
    ``qkv_bias`` the projections to latents have biases."""
    sizes = config.mla
    assert sizes is not None
    latent, rotary, device = sizes.kv_lora_rank, sizes.qk_rope_head_dim, source.device
    name, out, order = "q_a_proj", sizes.q_lora_rank, None
    if out is None:
        name, out = "q_proj", config.num_heads * (sizes.qk_nope_head_dim + rotary)
        order = _query_order(config, device)
    names, outs = [f"{prefix}.{name}", f"{prefix}.kv_a_proj_with_mqa"], [out, latent + rotary]
    key_order = (
        halves_first(1, latent + rotary, rotary, device, latent)
        if config.interleaved_rope
        else None
    )
    orders = [order, key_order]
    if not config.qkv_bias or sizes.q_lora_rank is not None:
        return read_linear(source, names, outs, config.hidden_size, config.qkv_bias, orders)
    linear = read_linear(source, names, outs, config.hidden_size, False, orders)
    bias = source.vector(f"{names[1]}.bias", outs[1])
    bias = bias if key_order is None else bias[key_order]
    linear.bias = torch.cat((bias.new_zeros(out), bias))
    return linear
