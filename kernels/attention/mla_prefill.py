"""Latent attention (MLA) for a step that holds prompts and whose lengths the host knows.

``q`` ``[T, H, Dn]`` and ``q_pe`` ``[T, H, R]`` (f32, f16, bf16; tokens and heads may be strided)
are the parts of the queries without and with rotation, ``kv_b`` ``[H, Dn + Dv, L]`` (dense) makes a
head's key and value of a latent, ``cache`` ``[blocks, block_size, 1, L + R]`` (dense) holds the
latents c and the rotated parts of the keys r, this step's included; all of one dtype.
``block_tables``, ``query_start`` and ``context_lens`` are those of ``squall.kernels.attention.
paged``, as is what every query sees; ``query_lens`` and ``contexts`` are the lengths on the host.

    k_j, v_j = kv_b[h] c_j
    out[h] = sum_j w_j v_j / sum_j w_j,   w_j = exp(scale * (q[h] . k_j + q_pe[h] . r_j))

Result: ``[T, H, Dv]``, dense. Rows of tokens outside every sequence are undefined, those of a
sequence without context zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from squall.kernels.attention.mla_decode import cached_latents
from squall.kernels.op import op


def mla_prefill_reference(
    q: Tensor,
    q_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
) -> Tensor:
    """One sequence at a time, scores as a whole matrix, float32."""
    heads, plain = q.shape[1:]
    out = torch.zeros((q.shape[0], heads, kv_b.shape[1] - plain), dtype=q.dtype, device=q.device)
    start = 0
    for s, (length, context) in enumerate(zip(query_lens, contexts, strict=True)):
        rows = slice(start, start + length)
        start += length
        if length == 0 or context == 0:
            continue
        latents = cached_latents(cache, block_tables[s], 0, context).float()
        expanded = torch.einsum("cl,hdl->hcd", latents[:, : kv_b.shape[2]], kv_b.float())
        scores = torch.einsum("nhd,hcd->hnc", q[rows].float(), expanded[..., :plain])
        scores += torch.einsum("nhr,cr->hnc", q_pe[rows].float(), latents[:, kv_b.shape[2] :])
        positions = torch.arange(context - length, context, device=q.device)
        hidden = torch.arange(context, device=q.device) > positions[:, None]
        weights = (scores * scale).masked_fill_(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hnc,hcd->nhd", weights, expanded[..., plain:]).to(q.dtype)
    return out


def _fake(
    q: Tensor,
    q_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
) -> Tensor:
    shape = (*q.shape[:2], kv_b.shape[1] - q.shape[2])
    return torch.empty(shape, dtype=q.dtype, device=q.device)


mla_prefill = op(
    "mla_prefill(Tensor q, Tensor q_pe, Tensor kv_b, Tensor cache, Tensor block_tables, "
    "Tensor query_start, Tensor context_lens, int[] query_lens, int[] contexts, float scale) "
    "-> Tensor",
    mla_prefill_reference,
    None,
    _fake,
)
