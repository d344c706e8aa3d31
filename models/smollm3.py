"""SmolLM 3: Llama in which every fourth layer knows no positions (NoPE)."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_rope, read_windows
from squall.models.config import ConfigReader, DecoderConfig, LayerConfig


def _read_ropes(reader: ConfigReader, count: int) -> list[int]:
    """Each layer's rope: 0 turns, 1 does not. ``no_rope_layers`` has 1 for layers that do turn."""
    flags = reader.get_list("no_rope_layers", None)
    if flags is None:
        interval = reader.get_int("no_rope_layer_interval", 4)
        flags = [int((i + 1) % interval != 0) for i in range(count)]
    if len(flags) != count:
        raise reader.fail("no_rope_layers", f"{len(flags)} entries for {count} layers")
    return [0 if flag else 1 for flag in flags]


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    count = config.num_layers
    windows = (0,) * count
    if reader.get_bool("use_sliding_window", False):
        windows = read_windows(reader, count, default_sliding=True)
    layers = map(LayerConfig, windows, _read_ropes(reader, count))
    turns = read_rope(reader, config.head_dim)
    return replace(
        config,
        layers=tuple(layers),
        ropes=(turns, replace(turns, rule="none")),
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
    )
