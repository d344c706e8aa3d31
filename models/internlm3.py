"""InternLM 3: Llama with two switches for biases, of q, k, v and of all else."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("bias", False)
    return replace(
        llama.read_config(reader),
        qkv_bias=reader.get_bool("qkv_bias", False),
        o_bias=bias,
        mlp_bias=bias,
    )
