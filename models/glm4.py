"""GLM-4 of 2025 (0414): the GLM-4 before it with norms behind attention and MLP too."""

from dataclasses import replace

from squall.models import glm
from squall.models.config import ConfigReader, DecoderConfig, NormNames

_NORMS = NormNames(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(glm.read_config(reader), norms=_NORMS)
