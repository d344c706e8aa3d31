"""OLMoE: Llama with norms over all of q and all of k, and experts in every layer."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import with_experts
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    if reader.get_float("clip_qkv", None) is not None:
        raise reader.fail("clip_qkv", "is not supported behind norms of q and k; accepted: null")
    router = RouterConfig(
        top_k=reader.get_int("num_experts_per_tok"),
        renormalize=reader.get_bool("norm_topk_prob", False),
    )
    moe = MoEConfig(reader.get_int("num_experts"), config.intermediate_size, router)
    return with_experts(replace(config, wide_qk_norm=True), moe)
