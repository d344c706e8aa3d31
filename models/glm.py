"""GLM-4 of 2024: Llama with rope on neighbouring elements of half of each head, gate and up in one
tensor, and biases on q, k, v."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    return replace(config, o_bias=False, fused_gate_up=True, interleaved_rope=True, wide_range=True)
