"""Apertus: Llama with norms of each head of q and k, and an MLP without gate and with xIELU."""

from dataclasses import replace

from squall.models import arcee
from squall.models.config import ConfigReader, DecoderConfig, NormNames


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        arcee.read_config(reader),
        qk_norm=True,
        norms=NormNames(attention="attention_layernorm", mlp="feedforward_layernorm"),
    )
