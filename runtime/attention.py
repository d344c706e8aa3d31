"""The attention backend a user asked for, or why it cannot be had."""

import torch

from squall.kernels.attention import xformers_backend
from squall.kernels.attention.paged import paged_attention
from squall.models.attention import Attend
from squall.models.config import DecoderConfig
from squall.runtime.memory import OptionError
from squall.runtime.options import EngineOptions

BACKENDS = ("auto", "triton", "xformers")


def choose_attention(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, options: EngineOptions
) -> Attend | None:
    """What a model on ``device`` is to compute attention with; None: its own choice.

    OptionError when the backend of ``options`` cannot be used.
    """
    name = options.attention_backend
    if name not in BACKENDS:
        accepted = ", ".join(BACKENDS)
        raise OptionError(f"--attention-backend {name!r} is not known; accepted: {accepted}")
    if name == "triton":
        return None if config.mla else paged_attention  # latent attention has no other kernels
    if name == "xformers":
        reason = f"it needs a CUDA GPU, not {device}" if device.type != "cuda" else None
        reason = reason or xformers_backend.probe() or _refusal(config, dtype, options)
        if reason is not None:
            accepted = "accepted here: auto, triton"
            raise OptionError(f"--attention-backend xformers: {reason}; {accepted}")
        return xformers_backend.paged_attention
    return None


def _refusal(config: DecoderConfig, dtype: torch.dtype, options: EngineOptions) -> str | None:
    if config.mla is not None:
        return "it has no latent attention (MLA)"
    features = {
        "window" if layer.window > 0 else "chunks" for layer in config.layers if layer.window
    }
    features |= {"softcap"} if config.attention_softcap else set()
    block_size = options.pa_blk_size
    return xformers_backend.refusal(config.head_dim, block_size, (dtype, dtype), features)
