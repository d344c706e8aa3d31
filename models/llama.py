"""Llama 2/3.x and what shares its block (Mistral reads its window on top)."""

from squall.models.common import read_activation, read_heads, read_layers, read_rope
from squall.models.config import Activation, ConfigReader, DecoderConfig


def read_config(
    reader: ConfigReader, eps: str = "rms_norm_eps", activation: Activation | None = None
) -> DecoderConfig:
    """``eps``: the key of the norms' epsilon; ``activation`` where it is read in another way."""
    heads = read_heads(reader)
    attention_bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        **heads,
        norm_eps=reader.get_float(eps, 1e-6 if eps == "rms_norm_eps" else 1e-5),
        layers=read_layers(reader, default_sliding=False),
        ropes=(read_rope(reader, heads["head_dim"]),),
        tie_embeddings=reader.get_bool("tie_word_embeddings", False),
        attention_scale=heads["head_dim"] ** -0.5,
        activation=activation or read_activation(reader),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
    )
