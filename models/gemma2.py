"""Gemma 2: Gemma with norms behind attention and MLP, softcaps, and a window in every other
layer."""

from dataclasses import replace

from squall.models import gemma
from squall.models.common import read_windows
from squall.models.config import ConfigReader, DecoderConfig, LayerConfig, NormNames

NORMS = NormNames(
    mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    count = reader.get_int("num_hidden_layers")
    if reader.has("layer_types"):
        windows = read_windows(reader, count, default_sliding=False)
    else:
        window = reader.get_int("sliding_window", 4096)
        windows = tuple(0 if i % 2 else window for i in range(count))
    return tuple(LayerConfig(window) for window in windows)


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        gemma.read_config(reader),
        layers=_read_layers(reader),
        attention_scale=reader.get_float("query_pre_attn_scalar", 256) ** -0.5,
        norms=NORMS,
        attention_softcap=reader.get_float("attn_logit_softcapping", None) or 0.0,
        logit_softcap=reader.get_float("final_logit_softcapping", None) or 0.0,
    )
