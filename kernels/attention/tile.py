"""Parts that the attention kernels share. Scores are kept in powers of two (log2 of weights)."""

import torch

from squall.kernels.lang import next_power_of_2, tl, triton

MAX_HEAD_DIM = 256


def padded_dim(dim: int) -> int:
    """Columns of a tile for heads of ``dim`` elements: a tensor core takes 16 at least."""
    return max(16, next_power_of_2(dim))


def dot_precision(device: torch.device) -> str:
    """How float32 products are formed: three TF32 products on NVIDIA's tensor cores keep float32
    accuracy in a fraction of the code and time of plain multiply-adds; others lack them."""
    return "ieee" if device.type == "xpu" or torch.version.hip else "tf32x3"


@triton.jit
def softcapped(products, scale, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores of ``products`` q . k, in powers of two."""
    if SOFTCAP:
        # tanh(z) = 2 sigmoid(2 z) - 1
        cap = softcap * 1.4426950408889634
        return cap * (2.0 * tl.sigmoid(products * (2.0 * scale / softcap)) - 1.0)
    else:
        return products * (scale * 1.4426950408889634)


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key that the query at ``position`` sees (``window.py``); less than zero where a
    sliding window reaches beyond the beginning, or where there is no query (position -1)."""
    if WINDOW < 0:
        CHUNK: tl.constexpr = -WINDOW
        return position // CHUNK * CHUNK
    elif WINDOW > 0:
        return position - (WINDOW - 1)
    else:
        return position * 0


@triton.jit
def nearest_keys(tile, first_key, context, TILE: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of a tile. Those outside [first_key, context) are replaced by the nearest one inside:
    nothing else is ever read, so what must be masked is finite (0 * NaN would be NaN)."""
    key = tl.minimum(tile * TILE + tl.arange(0, TILE), context - 1)
    return tl.maximum(key, first_key) if WINDOW != 0 else key
