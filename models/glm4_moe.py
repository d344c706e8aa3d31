"""GLM-4.5: a part of each head turned, norms on q and k, the experts of DeepSeek V3."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig
from squall.models.deepseek_experts import read_v3_router, with_experts


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    half = tuple(
        replace(rope, dim=config.head_dim // 2) if rope.dim == config.head_dim else rope
        for rope in config.ropes
    )
    ropes = config.ropes if _says_part(reader) else half
    config = replace(
        config, ropes=ropes, o_bias=False, qk_norm=reader.get_bool("use_qk_norm", False)
    )
    return with_experts(config, reader, read_v3_router(reader))


def _says_part(reader: ConfigReader) -> bool:
    """Whether the config says which part of a head turns; half of it otherwise."""
    return "partial_rotary_factor" in reader.rope()
