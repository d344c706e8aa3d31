"""Command-R7B and Command A: Command-R with a window in three of four layers; the others know no
positions."""

from dataclasses import replace

from squall.models import cohere
from squall.models.common import read_alternating_layers
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = cohere.read_config(reader)
    (turns,) = config.ropes
    every = reader.get_int("sliding_window_pattern", 4)
    return replace(
        config,
        layers=read_alternating_layers(reader, every),
        ropes=(replace(turns, rule="none"), turns),
    )
