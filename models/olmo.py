"""OLMo (1): Llama with layer norms that have no weights, and with q, k, v clipped."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        llama.read_config(reader, eps="layer_norm_eps"),
        layer_norm=True,
        plain_norms=True,
        qkv_clip=reader.get_float("clip_qkv", None) or 0.0,
    )
