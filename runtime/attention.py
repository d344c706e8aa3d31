"""The attention backend a user asked for, or why it cannot be had."""

from squall.kernels.attention import xformers_backend
from squall.kernels.attention.paged import paged_attention
from squall.models.decoder import Decoder
from squall.runtime.memory import OptionError
from squall.runtime.options import EngineOptions

BACKENDS = ("auto", "triton", "xformers")


def choose_attention(model: Decoder, options: EngineOptions) -> None:
    """Give the model the backend of ``options``. OptionError when it cannot be used."""
    name = options.attention_backend
    if name not in BACKENDS:
        raise OptionError(f"--attention-backend {name!r} is not known; accepted: {_accepted()}")
    if name == "triton":
        model.use_attention(paged_attention)
    if name == "xformers":
        reason = xformers_backend.probe() or _refusal(model, options)
        if reason is not None:
            accepted = "accepted here: auto, triton"
            raise OptionError(f"--attention-backend xformers: {reason}; {accepted}")
        model.use_attention(xformers_backend.paged_attention)


def _refusal(model: Decoder, options: EngineOptions) -> str | None:
    config = model.config
    features = {"window"} if any(layer.window for layer in config.layers) else set()
    features |= {"softcap"} if config.attention_softcap else set()
    dtypes = model.dtype, model.dtype
    return xformers_backend.refusal(config.head_dim, options.pa_blk_size, dtypes, features)


def _accepted() -> str:
    return ", ".join(BACKENDS)
