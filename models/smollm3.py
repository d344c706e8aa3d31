"""SmolLM 3: Llama in which every fourth layer knows no positions (NoPE)."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_no_ropes, read_rope, read_windows
from squall.models.config import ConfigReader, DecoderConfig, LayerConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    count = config.num_layers
    windows = (0,) * count
    if reader.get_bool("use_sliding_window", False):
        windows = read_windows(reader, count, default_sliding=True)
    layers = map(LayerConfig, windows, read_no_ropes(reader, count))
    turns = read_rope(reader, config.head_dim)
    return replace(
        config,
        layers=tuple(layers),
        ropes=(turns, replace(turns, rule="none")),
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
    )
