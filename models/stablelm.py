"""StableLM 2: Llama with layer norms, and attention and MLP side by side in the 12B model."""

from dataclasses import replace

from squall.models import llama
from squall.models.config import ConfigReader, DecoderConfig, NormNames


def read_config(reader: ConfigReader) -> DecoderConfig:
    if reader.get_bool("qk_layernorm", False):
        raise reader.fail("qk_layernorm", "is not supported")
    parallel = reader.get_bool("use_parallel_residual", False)
    return replace(
        llama.read_config(reader, eps="layer_norm_eps"),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=reader.get_bool("use_qkv_bias", False),
        o_bias=False,
        parallel=parallel,
        norms=NormNames(mlp="input_layernorm") if parallel else NormNames(),
    )
