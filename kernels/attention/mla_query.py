"""Latent attention (MLA), what comes before it: the latent into the cache, the queries turned.

DeepSeek-V2 (arXiv:2405.04434, section 2.1). ``q`` ``[T, H, Dn + R]`` (f32, f16, bf16; tokens and
heads may be strided) are query heads, of which the last R elements are rotated; ``latent``
``[T, L + R]`` of the same dtype (rows may be strided) are a token's latent and the part of its keys
that is rotated and shared by all heads. ``cache`` ``[blocks, block_size, 1, L + R]``, dense, of the
same dtype; ``norm`` float32 ``[L]``; ``positions``, ``cos_sin`` float32 ``[P, R]`` and ``slots`` as
in ``squall.kernels.attention.rope_store``, as is the rotation.

    cache[slots[t]] = (latent[:L] / sqrt(mean(latent[:L]^2) + eps) * norm, rotated latent[L:])

Result, of the dtype of ``q``, dense: without ``kv_b`` the rotated parts of the queries,
``[T, H, R]``. ``kv_b`` ``[H, Dn + Dv, L]`` (dense; the first Dn rows W of a head make its keys of a
latent c) is moved over to the queries, ``q_n (W c) = (q_n W) c`` ("absorbed"): ``[T, H, L + R]``
with ``q[:Dn] kv_b[h, :Dn]`` before the rotated part, which a decode step multiplies with the cache
as it is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.rope_store import store, turned
from squall.kernels.head_product import head_product_reference
from squall.kernels.op import op


def mla_query_reference(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_b: Tensor | None,
) -> Tensor:
    size, plain = norm.shape[0], q.shape[2] - cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    normed = F.rms_norm(latent[:, :size].float(), norm.shape, norm, eps)
    key = turned(latent[:, None, size:], None, eps, cos, sin)
    store(torch.cat((normed.unsqueeze(1), key), -1), cache, slots)
    rotated = turned(q[..., plain:], None, eps, cos, sin).to(q.dtype)
    if kv_b is None:
        return rotated
    return torch.cat((head_product_reference(q[..., :plain], kv_b[:, :plain]), rotated), -1)


def _fake(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_b: Tensor | None,
) -> Tensor:
    width = cos_sin.shape[1] if kv_b is None else cache.shape[3]
    return torch.empty((*q.shape[:2], width), dtype=q.dtype, device=q.device)


mla_query = op(
    "mla_query(Tensor q, Tensor latent, Tensor norm, float eps, Tensor positions, Tensor cos_sin, "
    "Tensor(a!) cache, Tensor slots, Tensor? kv_b) -> Tensor",
    mla_query_reference,
    None,
    _fake,
)
