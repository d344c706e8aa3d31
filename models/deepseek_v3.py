"""DeepSeek-V3, V3.1 and R1: V2 with other routing. Behind the last layer, checkpoints hold some for
multi-token prediction."""

from dataclasses import replace

from squall.models.config import ConfigReader, DecoderConfig
from squall.models.deepseek_v2 import read_dense, with_experts


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = with_experts(read_dense(reader), reader, "sigmoid", limited=True, group_best=2)
    if config.moe is not None:
        correction = "mlp.gate.e_score_correction_bias"
        config = replace(config, moe=replace(config.moe, correction=correction))
    return replace(
        config,
        interleaved_rope=reader.get_bool("rope_interleave", True),
        unused_layers=reader.get_int("num_nextn_predict_layers", 0),
    )
