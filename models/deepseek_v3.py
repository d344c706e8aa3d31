"""DeepSeek-V3, V3.1 and R1: attention as in V2; checkpoints hold layers for multi-token prediction
behind the last one."""

from dataclasses import replace

from squall.models import deepseek_v2
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        deepseek_v2.read_config(reader),
        interleaved_rope=reader.get_bool("rope_interleave", True),
        unused_layers=reader.get_int("num_nextn_predict_layers", 0),
    )
