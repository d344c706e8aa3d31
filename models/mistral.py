"""Mistral: Llama with a sliding window on every layer when ``sliding_window`` is set. Ministral 3:
scores that grow with the position too."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_layers
from squall.models.config import ConfigReader, DecoderConfig, QueryGrowth


def _read_growth(reader: ConfigReader) -> QueryGrowth | None:
    rope = reader.rope()
    beta, every = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not beta:
        return None
    if not every:
        message = "llama_4_scaling_beta needs original_max_position_embeddings"
        raise reader.fail("rope_parameters", message)
    return QueryGrowth(beta, every)


def read_config(reader: ConfigReader, eps: str = "rms_norm_eps") -> DecoderConfig:
    """``eps`` as in ``llama``."""
    growth = _read_growth(reader)
    layers = read_layers(reader, default_sliding=True)
    return replace(
        llama.read_config(reader, eps),
        layers=tuple(replace(layer, query_growth=growth) for layer in layers),
    )
