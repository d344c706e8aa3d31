"""Gemma 3 text: four (1 + w) norms a layer, q/k norms, scaled embeddings, five sliding layers
with their own rope before each global one."""

from squall.models import gemma2
from squall.models.common import (
    read_activation,
    read_alternating_layers,
    read_heads,
    read_rope,
)
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader, intermediate_size: int | None = None) -> DecoderConfig:
    """``intermediate_size`` as ``read_heads`` takes it."""
    heads = read_heads(reader, intermediate_size)
    head_dim = heads["head_dim"]
    attention_bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        **heads,
        norm_eps=reader.get_float("rms_norm_eps", 1e-6),
        layers=read_alternating_layers(reader, reader.get_int("sliding_window_pattern", 6)),
        ropes=(
            read_rope(reader, head_dim, "full_attention"),
            read_rope(reader, head_dim, "sliding_attention"),
        ),
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
        attention_scale=reader.get_float("query_pre_attn_scalar", 256) ** -0.5,
        activation=read_activation(reader, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        norm_offset=1.0,
        norms=gemma2.NORMS,
        embedding_scale=heads["hidden_size"] ** 0.5,
        attention_softcap=reader.get_float("attn_logit_softcapping", None) or 0.0,
        logit_softcap=reader.get_float("final_logit_softcapping", None) or 0.0,
        wide_range=True,
    )
