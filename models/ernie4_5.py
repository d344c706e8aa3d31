"""ERNIE 4.5 (dense): Llama with rope on neighbouring elements and one switch for all biases."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("use_bias", False)
    return replace(
        llama.read_config(reader),
        interleaved_rope=True,
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )
