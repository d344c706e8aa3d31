"""Arcee (AFM): Llama with an MLP without gate and squared ReLU."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_activation
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader, eps: str = "rms_norm_eps") -> DecoderConfig:
    """``eps`` as in ``llama``."""
    activation = read_activation(reader, default="relu2", gated=False)
    return replace(llama.read_config(reader, eps, activation), plain_mlp=("up_proj", "down_proj"))
