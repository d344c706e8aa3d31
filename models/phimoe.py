"""Phi 3.5 MoE: layer norms with biases, Mixtral's experts, chosen by SparseMixer."""

from dataclasses import replace

from squall.models import mistral, mixtral
from squall.models.config import ConfigReader, DecoderConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = replace(
        mistral.read_config(reader),
        layer_norm=True,
        norm_bias=True,
        head_bias=reader.get_bool("lm_head_bias", False),
    )
    top_k = reader.get_int("num_experts_per_tok", 2)
    jitter = reader.get_float("router_jitter_noise", 0.01)
    router = RouterConfig(top_k, scoring="sparsemixer", jitter=jitter)
    return mixtral.with_experts(config, reader, router)
