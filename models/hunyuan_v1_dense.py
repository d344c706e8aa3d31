"""HunYuan (dense): Llama with RMS norms of q and k behind the rope, whose base may be stretched."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig, RopeConfig


def _fixed_base(rope: RopeConfig) -> RopeConfig:
    """The files call it "dynamic", but an ``alpha`` makes it one base for all lengths."""
    alpha = rope.settings.get("alpha")
    if rope.rule != "dynamic" or not alpha:
        return rope
    theta = rope.theta * float(alpha) ** (rope.dim / (rope.dim - 2))
    return replace(rope, rule="default", theta=theta)


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    return replace(
        config,
        ropes=tuple(map(_fixed_base, config.ropes)),
        qk_norm=True,
        qk_norm_after_rope=True,
        qk_norm_names=("query_layernorm", "key_layernorm"),
    )
