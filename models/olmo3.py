"""OLMo 3: OLMo 2 with a window in three of four layers, whose rope is not stretched."""

from dataclasses import replace

from squall.models import olmo2
from squall.models.common import read_alternating_layers, read_rope
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = olmo2.read_config(reader)
    kinds = "full_attention", "sliding_attention"
    return replace(
        config,
        layers=read_alternating_layers(reader, full_every=4),
        ropes=tuple(read_rope(reader, config.head_dim, kind) for kind in kinds),
    )
