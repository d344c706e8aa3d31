"""Qwen 3: Qwen 2 without the q, k, v biases but with RMS norms on q and k."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig
from squall.models.qwen2 import read_qwen_layers


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    return replace(config, qk_norm=True, layers=read_qwen_layers(reader))
