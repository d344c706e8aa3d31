"""Command-R: layer norms without bias, attention and MLP side by side, rope on neighbouring
elements, scaled logits, layer norms of the heads of q and k (Command-R+)."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig, NormNames


def read_config(reader: ConfigReader) -> DecoderConfig:
    return replace(
        llama.read_config(reader, eps="layer_norm_eps"),
        layer_norm=True,
        parallel=True,
        norms=NormNames(mlp="input_layernorm"),
        interleaved_rope=True,
        head_layer_norm=reader.get_bool("use_qk_norm", False),
        logit_scale=reader.get_float("logit_scale", 0.0625),
        tie_embeddings=reader.get_bool("tie_word_embeddings", True),
    )
