"""Which quantised safetensors checkpoints can be read.

``fp8``: float8_e4m3fn matrices ``X.weight`` with float32 or 16-bit ``X.weight_scale_inv`` by blocks
of 128 x 128 (:mod:`squall.kernels.quant.fp8`). ``mxfp4``: experts as blocks of 32
(:mod:`squall.loaders.mxfp4`). What a config says of modules that are left alone is not needed: a
tensor's type and its neighbours say it.
"""

from squall.kernels.quant.fp8 import BLOCK
from squall.loaders.hf_config import ConfigReader

_KEY = "quantization_config"
_METHODS = ("fp8", "mxfp4")


def check_quantization(reader: ConfigReader) -> None:
    """``ModelLoadError`` where ``config.json`` asks for what is not supported."""
    if not reader.has(_KEY):
        return
    settings = ConfigReader(reader.get_dict(_KEY), reader.file, f"{reader.prefix}{_KEY}.")
    method = settings.get_str("quant_method")
    if method not in _METHODS:
        problem = f"{method!r} safetensors are not supported; accepted: {', '.join(_METHODS)}, GGUF"
        raise settings.fail("quant_method", problem)
    if method != "fp8":
        return
    settings.get_str("fmt", "e4m3", choices=("e4m3", "float8_e4m3fn"))
    settings.get_str("activation_scheme", "dynamic", choices=("dynamic",))
    block = settings.get_list("weight_block_size", None)
    if block != [BLOCK, BLOCK]:
        found = "one scale for a tensor" if block is None else f"blocks of {block}"
        raise settings.fail("weight_block_size", f"{found}; accepted: [{BLOCK}, {BLOCK}]")
