"""Qwen 2 and 2.5: Llama with biases on q, k, v; a window only with ``use_sliding_window``."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_windows
from squall.models.config import ConfigReader, DecoderConfig, LayerConfig


def read_qwen_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    """The first ``max_window_layers`` layers see everything, the others ``sliding_window``."""
    count = reader.get_int("num_hidden_layers")
    if not reader.get_bool("use_sliding_window", False):
        return (LayerConfig(),) * count
    windows = read_windows(reader, count, default_sliding=True)
    if not reader.has("layer_types"):
        full = reader.get_int("max_window_layers", 28)
        windows = tuple(0 if i < full else window for i, window in enumerate(windows))
    return tuple(LayerConfig(window) for window in windows)


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    layers = read_qwen_layers(reader)
    return replace(config, qkv_bias=True, o_bias=False, layers=layers, wide_range=True)
