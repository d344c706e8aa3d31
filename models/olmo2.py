"""OLMo 2: Llama with norms behind attention and MLP only, and norms over all of q and all of k."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig, NormNames

_NORMS = NormNames(
    attention=None,
    mlp=None,
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(llama.read_config(reader), norms=_NORMS, wide_qk_norm=True)
