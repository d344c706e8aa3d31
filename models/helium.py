"""Helium: Llama with rope on neighbouring elements."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(llama.read_config(reader), o_bias=False, interleaved_rope=True)
