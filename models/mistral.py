"""Mistral: Llama with a sliding window on every layer when ``sliding_window`` is set."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_layers
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader, eps: str = "rms_norm_eps") -> DecoderConfig:
    """``eps`` as in ``llama``."""
    return replace(llama.read_config(reader, eps), layers=read_layers(reader, default_sliding=True))
