"""Phi 3, 3.5 and 4: Llama with q, k, v in one tensor and gate, up in another, rotation of a part
of each head (Phi 4 mini) and LongRoPE."""

from dataclasses import replace

from squall.models import mistral
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(mistral.read_config(reader), fused_qkv=True, fused_gate_up=True)
