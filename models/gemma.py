"""Gemma: Llama with (1 + w) norms, scaled embeddings and a gated GELU."""

from dataclasses import replace

from squall.models import llama
from squall.models.common import read_activation
from squall.models.config import ConfigReader, DecoderConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = llama.read_config(reader)
    # The published files say "gelu" in hidden_act and mean the tanh form, as transformers does.
    return replace(
        config,
        activation=read_activation(reader, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        wide_range=True,
    )
