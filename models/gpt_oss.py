"""GPT-OSS: attention sinks, windows on every other layer, biased experts with a clamped gate."""

from dataclasses import replace

from squall.kernels.activation import CLAMP, CLAMPED_SLOPE
from squall.models import llama
from squall.models.common import read_alternating_layers, with_experts
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    for key, accepted in (("swiglu_limit", CLAMP), ("swiglu_alpha", CLAMPED_SLOPE)):
        value = reader.get_float(key, accepted)
        if value != accepted:
            raise reader.fail(key, f"{value} is not supported; accepted: {accepted}")
    config = llama.read_config(reader)
    moe = MoEConfig(
        reader.get_int("num_local_experts"),
        config.intermediate_size,
        RouterConfig(reader.get_int("num_experts_per_tok", 4), scoring="top_softmax"),
        gate="mlp.router",
        router_bias=True,
        gate_up=("mlp.experts.gate_up_proj",),
        down="mlp.experts.down_proj",
        biases=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
        transposed=True,
        interleaved=True,
    )
    layers = tuple(replace(layer, rope=0) for layer in read_alternating_layers(reader, 2))
    bias = reader.get_bool("attention_bias", True)
    config = replace(
        config,
        activation="clamped_silu",
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        layers=layers,
    )
    return with_experts(config, moe)
