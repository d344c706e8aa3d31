"""The decoder-only transformer, assembled from a :class:`DecoderConfig`."""

import torch
from torch import Tensor

from squall.kernels.rmsnorm import add_rms_norm, rms_norm
from squall.kernels.weight import Weight
from squall.models.attention import Attention
from squall.models.batch import Batch, KVCache
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.mlp import GatedMLP
from squall.models.rope import rope_table
from squall.models.weights import WeightSource


class Block:
    """One layer. The residual stream is added to inside the norms (``add_rms_norm``)."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, source: WeightSource, prefix: str
    ) -> None:
        def norm(name: str) -> Tensor:
            return source.norm(f"{prefix}.{name}.weight", config.hidden_size, config.norm_offset)

        self.eps = config.norm_eps
        self.rope = layer.rope
        self.input_norm = norm("input_layernorm")
        self.attention = Attention(config, layer, source, f"{prefix}.self_attn")
        self.mlp = GatedMLP(config, source, f"{prefix}.mlp")
        self.post_attention_norm: Tensor | None = None
        self.post_mlp_norm: Tensor | None = None
        if config.post_norms:
            self.post_attention_norm = norm("post_attention_layernorm")
            self.mlp_norm = norm("pre_feedforward_layernorm")
            self.post_mlp_norm = norm("post_feedforward_layernorm")
        else:
            self.mlp_norm = norm("post_attention_layernorm")

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``x`` [T, hidden]: the last block's output, not yet added; ``residual`` float32: the
        stream before it. Returns the same pair for this block."""
        x, residual = add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(x, batch, cache, rope)
        if self.post_attention_norm is not None:
            x = rms_norm(x, self.post_attention_norm, self.eps)
        x, residual = add_rms_norm(x, residual, self.mlp_norm, self.eps)
        x = self.mlp(x)
        if self.post_mlp_norm is not None:
            x = rms_norm(x, self.post_mlp_norm, self.eps)
        return x, residual


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
        self.blocks = [
            Block(config, layer, source, f"model.layers.{i}")
            for i, layer in enumerate(config.layers)
        ]
        self.norm = source.norm("model.norm.weight", config.hidden_size, config.norm_offset)
        self.head = (
            self.embedding if config.tie_embeddings else source.matrix("lm_head.weight", *shape)
        )
        self.ropes = [rope_table(rope, max_len, source.device) for rope in config.ropes]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight matrices; a tied head counts once."""
        linears = [
            linear.nbytes
            for block in self.blocks
            for linear in (
                block.attention.qkv,
                block.attention.out,
                block.mlp.gate_up,
                block.mlp.down,
            )
        ]
        head = 0 if self.head is self.embedding else self.head.nbytes
        return sum(linears) + self.embedding.nbytes + head

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        """Final-norm hidden states of the rows in ``batch.logit_rows``, [L, hidden]."""
        config = self.config
        x = self.embedding.rows(batch.token_ids, self.dtype)
        if config.embedding_scale != 1.0:  # rounded to the model's dtype, as transformers does
            x = x * torch.tensor(config.embedding_scale, dtype=self.dtype)
        # the stream that every layer adds to stays float32: in bf16 its rounding would be the
        # largest error of all
        residual = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for block, *pages in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, residual = block(x, residual, batch, (pages[0], pages[1]), self.ropes[block.rope])
        x, residual = x[batch.logit_rows], residual[batch.logit_rows]
        return add_rms_norm(x, residual, self.norm, config.norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """``[L, hidden] -> [L, vocab]`` float32, not rounded to the model's dtype on the way: in
        bf16 the best tokens of a small model would tie."""
        logits = self.head.matmul_f32(hidden)
        cap = self.config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits of ``batch.logit_rows``, float32 [L, vocab]."""
        return self.logits(self.hidden(batch, cache))
