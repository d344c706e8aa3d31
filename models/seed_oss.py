"""Seed-OSS: Llama with biases on q, k, v, and a switch of its own for that of the output."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        llama.read_config(reader),
        qkv_bias=reader.get_bool("attention_bias", True),
        o_bias=reader.get_bool("attention_out_bias", False),
    )
