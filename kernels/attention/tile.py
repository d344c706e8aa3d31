"""One tile of keys, shared by the decode and the prefill kernel (online softmax).

The running maximum, sum and weighted values are kept in float32 (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135); scores are in powers of two.
"""

import torch

from squall.kernels.lang import tl, triton

MAX_HEAD_DIM = 256


def dot_precision(device: torch.device) -> str:
    """How float32 products are formed: three TF32 products on NVIDIA's tensor cores keep float32
    accuracy in a fraction of the code and time of plain multiply-adds; others lack them."""
    return "ieee" if device.type == "xpu" or torch.version.hip else "tf32x3"


@triton.jit
def attend_tile(  # type: ignore[no-untyped-def]
    q,
    peak,
    total,
    acc,
    tile,
    first_key,
    end_key,
    positions,
    k_ptr,
    v_ptr,
    table_ptr,
    scale,
    softcap,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold keys tile*TILE ... tile*TILE+TILE-1 into (peak, total, acc).

    ``q`` [M, BLOCK_DIM] at absolute ``positions`` [M]; ``k_ptr``, ``v_ptr`` point at the kv head
    of slot 0 and ROW elements separate slots. Only keys in [first_key, end_key) are read, neither
    the cache nor the block table is touched for others; what is not read counts as zero, so NaN
    in unused slots cannot leak through 0 * NaN. Without MASKED every key of the tile must be in
    range and visible to every row.
    """
    key = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_DIM)
    if MASKED:
        valid = (key >= first_key) & (key < end_key)
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None] & (d < DIM)[None, :]
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
        mask = (d < DIM)[None, :]
    offsets = (block * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * ROW + d[None, :]
    if MASKED or DIM != BLOCK_DIM:
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(q.dtype)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(q.dtype)
    else:
        k = tl.load(k_ptr + offsets).to(q.dtype)
        v = tl.load(v_ptr + offsets).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(z) = 2 sigmoid(2 z) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores *= 1.4426950408889634
    if MASKED:
        visible = valid[None, :] & (key[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (key[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
    return new_peak, total, acc
