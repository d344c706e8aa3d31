"""Granite: Llama with multipliers on embeddings, attention scores, residuals and logits.

The residual multiplier r costs nothing: of the stream ``x`` Granite computes
``x += r * f(norm(x))``, and ``x / r`` is the stream of the same layers without it, because an RMS
norm takes out the factor when its epsilon is divided by r^2.
"""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def _positive(reader: ConfigReader, key: str) -> float:
    value = float(reader.get_float(key, 1.0))
    if value <= 0:
        raise reader.fail(key, f"{value} is not above 0")
    return value


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    residual = _positive(reader, "residual_multiplier")
    return replace(
        config,
        norm_eps=config.norm_eps / residual**2,
        embedding_scale=_positive(reader, "embedding_multiplier") / residual,
        attention_scale=_positive(reader, "attention_multiplier"),
        logit_scale=1.0 / _positive(reader, "logits_scaling"),
    )
