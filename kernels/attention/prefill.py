"""Paged attention for any query lengths: tiles of (query tokens x heads of one kv head).

All keys, this step's included, come from the cache, so a cached prefix needs nothing special. The
grid covers the query tiles of all sequences without a host-side list: sequence s owns tiles
``(query_start[s] - query_start[0]) // Q + s`` onwards (Q tokens a tile), found by bisection. Only
tiles of keys on the edges, causal and of a window, are masked; those beyond are never visited. The
last tiles of a sequence have the most keys, so they start first. Arguments are those of
``squall.kernels.attention.paged``.
"""

import torch
from torch import Tensor

from squall.kernels.attention.fp8 import read, value_as
from squall.kernels.attention.tile import (
    dot_precision,
    first_seen,
    nearest_keys,
    padded_dim,
    softcapped,
)
from squall.kernels.lang import tl, triton
from squall.kernels.launch import kernel
from squall.kernels.tuning import Config, tuned


@triton.jit
def sequence_of(block, query_start_ptr, sequences, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last sequence whose first tile is at most ``block``."""
    origin = tl.load(query_start_ptr)
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_start_ptr + middle) - origin) // TOKENS + middle <= block:
            low = middle
        else:
            high = middle
    return low, (tl.load(query_start_ptr + low) - origin) // TOKENS + low


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    peak,
    total,
    acc,
    first,
    end,
    positions,
    first_key,
    context,
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
    """Fold tiles ``first`` ... ``end`` - 1 of TILE keys into (peak, total, acc) of the rows of
    ``q`` at ``positions`` (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et
    al. 2022, arXiv:2205.14135). Without MASKED all rows see all these keys."""
    d = tl.arange(0, BLOCK_DIM)
    near = nearest_keys(first, first_key, context, TILE, WINDOW)
    block = tl.load(table_ptr + near // BLOCK_SIZE)
    for tile in range(first, end):
        rows = (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE) * ROW
        offsets = rows[:, None] + d[None, :]
        # The next tile's blocks are looked up here, so that the loads of its keys wait for nothing.
        near = nearest_keys(tile + 1, first_key, context, TILE, WINDOW)
        block = tl.load(table_ptr + near // BLOCK_SIZE)
        if DIM == BLOCK_DIM:
            k = value_as(tl.load(k_ptr + offsets), q.dtype)
            v = value_as(tl.load(v_ptr + offsets), q.dtype)
        else:
            k = value_as(tl.load(k_ptr + offsets, mask=(d < DIM)[None, :], other=0.0), q.dtype)
            v = value_as(tl.load(v_ptr + offsets, mask=(d < DIM)[None, :], other=0.0), q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = softcapped(scores, scale, softcap, SOFTCAP)
        if MASKED:
            key = tile * TILE + tl.arange(0, TILE)
            visible = key[None, :] <= positions[:, None]
            if WINDOW != 0:
                visible = visible & (key[None, :] >= first_seen(positions, WINDOW)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = new_peak
        if MASKED and WINDOW != 0:
            # A row that has seen nothing yet: -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc


@kernel(do_not_specialize=["sequences", "table_stride"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    query_start_ptr,
    context_lens_ptr,
    sinks_ptr,
    sequences,
    table_stride,
    q_token_stride,
    q_head_stride,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid ((tokens // TOKENS + S) * kv heads * blocks of HEADS query heads,); row r of the ROWS >=
    TOKENS * HEADS rows is token r // HEADS, head r % HEADS."""
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    columns: tl.constexpr = KV_HEADS * head_blocks
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program // columns
    sequence, first_block = sequence_of(block, query_start_ptr, sequences, TOKENS)
    start = tl.load(query_start_ptr + sequence)
    length = tl.load(query_start_ptr + sequence + 1) - start
    first = (block - first_block) * TOKENS
    if first >= length:
        return
    context = tl.load(context_lens_ptr + sequence)
    kv_head = program % columns // head_blocks
    row = tl.arange(0, ROWS)
    in_group = (program % head_blocks) * HEADS + row % HEADS
    token = first + row // HEADS
    used = (row < TOKENS * HEADS) & (token < length) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_DIM)
    mask = used[:, None] & (d < DIM)[None, :]
    global_token = (start + token).to(tl.int64)
    q_offsets = global_token * q_token_stride + head.to(tl.int64) * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + d[None, :], mask=mask, other=0.0)

    # Rows past the end see what the last token sees.
    first_position = context - length + first
    positions = tl.minimum(first_position + row // HEADS, context - 1)
    last_position = tl.minimum(first_position + TOKENS, context) - 1
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], dtype=tl.float32)
    table = table_ptr + tl.cast(sequence, tl.int64) * table_stride
    k_base = k_ptr + kv_head * DIM
    v_base = v_ptr + kv_head * DIM
    first_key = 0
    open_from = 0
    if WINDOW != 0:
        # Keys that some rows see and others no longer do.
        first_key = tl.maximum(first_seen(first_position, WINDOW), 0)
        open_from = (tl.maximum(first_seen(last_position, WINDOW), 0) + TILE - 1) // TILE
        open_from = tl.minimum(open_from, (last_position + TILE) // TILE)
        peak, total, acc = _attend(
            q, peak, total, acc, first_key // TILE, open_from, positions, first_key, context,
            k_base, v_base, table, scale, softcap, DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE, TILE,
            WINDOW, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    open_to = tl.maximum((first_position + 1) // TILE, open_from)
    peak, total, acc = _attend(
        q, peak, total, acc, open_from, open_to, positions, first_key, context, k_base, v_base,
        table, scale, softcap, DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP,
        PRECISION, False,
    )  # fmt: skip
    peak, total, acc = _attend(
        q, peak, total, acc, open_to, (last_position + TILE) // TILE, positions, first_key,
        context, k_base, v_base, table, scale, softcap, DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE,
        TILE, WINDOW, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=used, other=0.0) * 1.4426950408889634
        highest = tl.maximum(peak, sink)
        decay = tl.exp2(peak - highest)
        total = total * decay + tl.exp2(sink - highest)
        acc = acc * decay[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    offsets = (global_token * (KV_HEADS * GROUP) + head)[:, None] * DIM + d[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def config_key(dim: int, group: int, dtype: torch.dtype) -> str:
    """The row of a tuning table; ``dtype`` is that of the caches."""
    return f"d{dim}-g{group}-{8 * dtype.itemsize}bit"


def _rule(block_dim: int, itemsize: int) -> Config:
    """Launch parameters within the shared memory of an A100 (163 KiB)."""
    if itemsize == 4:
        rows, tile, warps, stages = (32, 32, 4, 1) if block_dim > 128 else (64, 32, 4, 2)
    elif block_dim > 128:
        rows, tile, warps, stages = 64, 32, 4, 2
    else:
        rows, tile, warps, stages = 128, 64, 8, 3
    return {"rows": rows, "tile": tile, "warps": warps, "stages": stages}


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, int, float],
    sinks: Tensor | None,
    out: Tensor,
    tokens: int,
    config: Config | None = None,
) -> None:
    """Launch; ``index`` is (block_tables, query_start, context_lens), ``limits`` (scale, window,
    softcap), ``tokens`` at least the sum of these sequences' query lengths. Without ``config`` the
    launch parameters are the tuned ones or follow a rule."""
    tables, query_start, context_lens = index
    scale, window, softcap = limits
    heads, dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = tables.shape[0], heads // kv_heads
    block_dim = padded_dim(dim)
    if config is None:
        key = config_key(dim, group, k_cache.dtype)
        config = tuned("prefill", key, q.device) or _rule(block_dim, q.itemsize)
    rows = config["rows"]
    block_heads = min(group, rows)
    row_tokens = rows // block_heads
    blocks = tokens // row_tokens + sequences
    _prefill_kernel[(blocks * kv_heads * -(-group // block_heads),)](
        q, read(k_cache), read(v_cache), out, tables, query_start, context_lens,
        query_start if sinks is None else sinks, sequences, tables.stride(0), q.stride(0),
        q.stride(1), scale, softcap, kv_heads, group, dim, block_dim, block_heads, row_tokens, rows,
        block_size, config["tile"], window, softcap > 0, sinks is not None, dot_precision(q.device),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
