"""Qwen 2 MoE (Qwen 1.5 MoE too): Qwen 2 with experts and an MLP that all tokens share."""

from dataclasses import replace

from squall.models import qwen2
from squall.models.config import ConfigReader, DecoderConfig
from squall.models.qwen3_moe import with_experts


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = with_experts(qwen2.read_config(reader), reader)
    assert config.moe is not None
    shared = {
        "shared": "mlp.shared_expert",
        "shared_size": reader.get_int("shared_expert_intermediate_size"),
        "shared_gate": "mlp.shared_expert_gate",
    }
    return replace(config, moe=replace(config.moe, **shared))
