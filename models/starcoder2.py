"""StarCoder 2: layer norms, an MLP without gate, biases everywhere, a window."""

from dataclasses import replace

from squall.models import mistral
from squall.models.common import read_activation
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("use_bias", True)
    return replace(
        mistral.read_config(reader, eps="norm_epsilon"),
        activation=read_activation(reader, "hidden_act", "gelu_pytorch_tanh", gated=False),
        layer_norm=True,
        norm_bias=True,
        plain_mlp=("c_fc", "c_proj"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
    )
