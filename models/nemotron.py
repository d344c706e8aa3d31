"""Nemotron, Minitron: (1 + w) layer norms, an MLP without gate and with squared ReLU, rotation of a
part of each head."""

from dataclasses import replace

from squall.models import arcee
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        arcee.read_config(reader, eps="norm_eps"),
        layer_norm=True,
        norm_bias=True,
        norm_offset=1.0,
    )
