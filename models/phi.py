"""Phi 1, 1.5 and 2: layer norms, attention and MLP side by side, an MLP without gate, rotation of a
part of each head, biases everywhere and names of their own."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_activation
from squall.models.config import ConfigReader, DecoderConfig, NormNames


def read_config(reader: ConfigReader) -> DecoderConfig:
    if reader.get_bool("qk_layernorm", False):
        raise reader.fail("qk_layernorm", "is not supported; no published Phi has it")
    return replace(
        llama.read_config(reader, eps="layer_norm_eps"),
        activation=read_activation(reader, "hidden_act", "gelu_new", gated=False),
        layer_norm=True,
        norm_bias=True,
        parallel=True,
        norms=NormNames(mlp="input_layernorm"),
        plain_mlp=("fc1", "fc2"),
        attention_out="dense",
        final_norm="model.final_layernorm",
        head_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        wide_range=True,
    )
