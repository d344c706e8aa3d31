"""Norms of q, k and v but for one RMS norm of each head of q and of k, which attention fuses."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from squall.kernels.layernorm import layer_norm
from squall.kernels.rmsnorm import rms_norm
from squall.models.config import DecoderConfig
from squall.models.rope import halves_first
from squall.models.weights import WeightSource

# Takes q, k and v side by side, [T, (H + 2 KV) D], and returns them normed.
QKNorm = Callable[[Tensor], Tensor]


def read_qk_norm(
    config: DecoderConfig, source: WeightSource, names: tuple[str, str], rotary: int
) -> QKNorm | None:
    """What norms q, k or v before the rope, whose first ``rotary`` elements of a head turn; None if
    nothing does. ``names`` are those of the modules."""
    heads = config.num_heads, config.num_kv_heads
    dim, eps = config.head_dim, config.norm_eps
    if config.wide_qk_norm:
        offset = config.norm_offset
        wide = [
            source.norm(f"{name}.weight", count * dim, offset)
            for name, count in zip(names, heads, strict=True)
        ]
        return partial(_wide_norms, weights=wide, eps=eps)
    if config.head_layer_norm:
        each = [source.head_norms(n, c, dim) for n, c in zip(names, heads, strict=True)]
        if config.interleaved_rope:
            order = halves_first(1, dim, rotary, source.device)
            each = [weight[:, order] for weight in each]
        plain = torch.ones(dim, device=source.device)
        return partial(_head_layer_norms, weight=torch.cat(each), plain=plain, eps=eps)
    if config.v_norm:
        plain = torch.ones(dim, device=source.device)
        return partial(_value_norms, size=config.num_kv_heads * dim, plain=plain, eps=eps)
    return None


def _value_norms(qkv: Tensor, size: int, plain: Tensor, eps: float) -> Tensor:
    """An RMS norm without weights of each head of v, which are the last ``size`` columns; ``plain``
    float32 ones ``[D]``."""
    turned, values = torch.split(qkv, [qkv.shape[1] - size, size], 1)
    normed = rms_norm(values.reshape(-1, plain.shape[0]), plain, eps, qkv.dtype)
    return torch.cat((turned, normed.view(-1, size)), 1)


def _wide_norms(qkv: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    """One RMS norm over all of q, one over all of k; ``weights`` float32 ``[H D]``, ``[KV D]``."""
    sizes = [weight.shape[0] for weight in weights]
    *parts, values = torch.split(qkv, [*sizes, sizes[-1]], 1)
    pairs = zip(parts, weights, strict=True)
    normed = [rms_norm(part, weight, eps, qkv.dtype) for part, weight in pairs]
    return torch.cat((*normed, values), 1)


def _head_layer_norms(qkv: Tensor, weight: Tensor, plain: Tensor, eps: float) -> Tensor:
    """A layer norm of each head of q and k; ``weight`` float32 ``[H + KV, D]``, ``plain`` ones
    ``[D]``."""
    sizes = [weight.numel(), qkv.shape[1] - weight.numel()]
    turned, values = torch.split(qkv, sizes, 1)
    heads = turned.reshape(-1, weight.shape[1])
    normed = layer_norm(heads, plain, None, eps, torch.float32).view(-1, *weight.shape) * weight
    return torch.cat((normed.flatten(1).to(qkv.dtype), values), 1)
