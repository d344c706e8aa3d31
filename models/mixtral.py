"""Mixtral: Mistral with experts."""

from squall.models import common, mistral
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig

_EXPERT = "block_sparse_moe.experts.{}"


def read_config(reader: ConfigReader) -> DecoderConfig:
    router = RouterConfig(top_k=reader.get_int("num_experts_per_tok", 2), renormalize=True)
    return with_experts(mistral.read_config(reader), reader, router)


def with_experts(
    config: DecoderConfig, reader: ConfigReader, router: RouterConfig
) -> DecoderConfig:
    """``config`` with experts in all layers, by Mixtral's names."""
    moe = MoEConfig(
        reader.get_int("num_local_experts", 8),
        config.intermediate_size,
        router,
        gate="block_sparse_moe.gate",
        gate_up=(f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"),
        down=f"{_EXPERT}.w2.weight",
    )
    return common.with_experts(config, moe)
