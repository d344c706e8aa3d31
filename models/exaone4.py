"""EXAONE 4: norms as in OLMo 2, but of each head of q and k; in the 32B model a window in three of
four layers, and no positions in the others."""

from dataclasses import replace

from squall.models import olmo2
from squall.models.common import read_alternating_layers
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = replace(olmo2.read_config(reader), wide_qk_norm=False, qk_norm=True)
    if not reader.has("sliding_window"):
        return config
    (turns,) = config.ropes
    every = 0 if reader.has("layer_types") else reader.get_int("sliding_window_pattern")
    return replace(
        config,
        layers=read_alternating_layers(reader, every),
        ropes=(replace(turns, rule="none"), turns),
    )
