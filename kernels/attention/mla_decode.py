"""Latent attention (MLA) of single tokens, on the latents as they are in the cache.

``q`` ``[T, H, L + R]`` (f32, f16, bf16; dense) are absorbed queries (``squall.kernels.attention.
mla_query``), ``cache`` ``[blocks, block_size, 1, L + R]`` (dense, of the dtype of ``q``) holds one
key a token, whose first L elements are its value as well: multi-query attention with one kv head.
``block_tables``, ``query_start`` and ``context_lens`` are those of ``squall.kernels.attention.
paged``; a sequence has one query token at most, its last.

    out[h] = sum_j w_j c_j[:L] / sum_j w_j,   w_j = exp(scale * q[h] . c_j)   over all keys j

Result: ``[T, H, L]``, dense. A sequence with no context gives zeros.
"""

import torch
from torch import Tensor

from squall.kernels.op import op


def mla_decode_reference(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    out = torch.zeros((*q.shape[:2], latent), dtype=q.dtype, device=q.device)
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        if starts[s] == starts[s + 1] or context == 0:
            continue
        keys = cached_latents(cache, block_tables[s], 0, context).float()
        weights = (q[starts[s]].float() @ keys.t() * scale).softmax(-1)
        out[starts[s]] = (weights @ keys[:, :latent]).to(q.dtype)
    return out


def cached_latents(cache: Tensor, table: Tensor, first: int, end: int) -> Tensor:
    """Latents ``first ... end - 1`` of a sequence, ``[end - first, L + R]``."""
    size = cache.shape[1]
    blocks = table[first // size : -(-end // size)].long()
    rows = cache.index_select(0, blocks).flatten(0, 2)
    return rows[first % size : first % size + end - first]


def _fake(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    return torch.empty((*q.shape[:2], latent), dtype=q.dtype, device=q.device)


mla_decode = op(
    "mla_decode(Tensor q, Tensor cache, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, int latent, float scale) -> Tensor",
    mla_decode_reference,
    None,
    _fake,
)
