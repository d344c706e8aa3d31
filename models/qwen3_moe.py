"""Qwen 3 MoE: Qwen 3 with experts in all layers, or in those that the config leaves to them."""

from squall.models import common, qwen3
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return with_experts(qwen3.read_config(reader), reader)


def with_experts(config: DecoderConfig, reader: ConfigReader) -> DecoderConfig:
    """``config`` with Qwen's experts."""
    router = RouterConfig(
        top_k=reader.get_int("num_experts_per_tok"),
        renormalize=reader.get_bool("norm_topk_prob", False),
    )
    key = "num_experts" if reader.has("num_experts") else "num_local_experts"
    moe = MoEConfig(reader.get_int(key), reader.get_int("moe_intermediate_size"), router)
    step = reader.get_int("decoder_sparse_step", 1)
    dense = reader.get_list("mlp_only_layers", None) or []
    return common.with_experts(
        config, moe, lambda layer: layer not in dense and (layer + 1) % step == 0
    )
