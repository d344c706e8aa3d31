"""StableLM 2: Llama with layer norms; in the 12B model attention and MLP side by side, and layer
norms of the heads of q and k."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig, NormNames


def read_config(reader: ConfigReader) -> DecoderConfig:
    parallel = reader.get_bool("use_parallel_residual", False)
    return replace(
        llama.read_config(reader, eps="layer_norm_eps"),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=reader.get_bool("use_qkv_bias", False),
        o_bias=False,
        head_layer_norm=reader.get_bool("qk_layernorm", False),
        qk_norm_names=("q_layernorm", "k_layernorm"),
        parallel=parallel,
        norms=NormNames(mlp="input_layernorm") if parallel else NormNames(),
    )
