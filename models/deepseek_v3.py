"""DeepSeek-V3, V3.1 and R1: V2 with other routing."""

from dataclasses import replace

from squall.models.config import ConfigReader, DecoderConfig
from squall.models.deepseek_experts import read_v3_router, with_experts
from squall.models.deepseek_v2 import has_experts, read_dense


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = read_dense(reader)
    if has_experts(config, reader, "sigmoid"):
        config = with_experts(config, reader, read_v3_router(reader))
    return replace(config, interleaved_rope=reader.get_bool("rope_interleave", True))
