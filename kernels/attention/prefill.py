"""Paged attention for any query lengths: tiles of (query tokens x heads of one kv head).

All keys, this step's included, come from the cache, so a cached prefix needs nothing special. A
one-dimensional grid covers the query tiles of all sequences without a host-side list: sequence s
owns tiles ``query_start[s] // Q + s`` onwards (Q tokens a tile), found by bisection. Keys before
the first row's position need no mask; a window or the causal edge does. Arguments are those of
``squall.kernels.attention.paged``.
"""

import torch
from torch import Tensor

from squall.kernels.attention.tile import attend_tile, dot_precision
from squall.kernels.lang import next_power_of_2, tl, triton


@triton.jit
def _sequence_of(block, query_start_ptr, sequences, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last sequence whose first tile is at most ``block``."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["sequences", "table_stride", "q_token_stride"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    query_start_ptr,
    context_lens_ptr,
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
    PRECISION: tl.constexpr,
):
    """Grid (T // TOKENS + S, kv heads * blocks of HEADS query heads); row r of the ROWS >= TOKENS
    * HEADS rows is token r // HEADS, head r % HEADS."""
    block = tl.program_id(0)
    sequence = _sequence_of(block, query_start_ptr, sequences, TOKENS)
    start = tl.load(query_start_ptr + sequence)
    length = tl.load(query_start_ptr + sequence + 1) - start
    first = (block - start // TOKENS - sequence) * TOKENS
    if first >= length:
        return
    context = tl.load(context_lens_ptr + sequence)
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // head_blocks
    row = tl.arange(0, ROWS)
    in_group = (tl.program_id(1) % head_blocks) * HEADS + row % HEADS
    token = first + row // HEADS
    used = (row < TOKENS * HEADS) & (token < length) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_DIM)
    mask = used[:, None] & (d < DIM)[None, :]
    global_token = (start + token).to(tl.int64)
    q_offsets = global_token * q_token_stride + head.to(tl.int64) * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + d[None, :], mask=mask, other=0.0)

    first_position = context - length + first
    positions = first_position + row // HEADS
    end_key = tl.minimum(first_position + TOKENS, context)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], dtype=tl.float32)
    table = table_ptr + tl.cast(sequence, tl.int64) * table_stride
    k_base = k_ptr + kv_head * DIM
    v_base = v_ptr + kv_head * DIM
    masked_from = first_key // TILE
    if WINDOW == 0:
        masked_from = (first_position + 1) // TILE
        for tile in range(0, masked_from):
            peak, total, acc = attend_tile(
                q, peak, total, acc, tile, first_key, end_key, positions, k_base, v_base, table,
                scale, softcap, DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE, TILE, WINDOW,
                SOFTCAP, PRECISION, False,
            )  # fmt: skip
    for tile in range(masked_from, (end_key + TILE - 1) // TILE):
        peak, total, acc = attend_tile(
            q, peak, total, acc, tile, first_key, end_key, positions, k_base, v_base, table,
            scale, softcap, DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE, TILE, WINDOW,
            SOFTCAP, PRECISION, True,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    offsets = (global_token * (KV_HEADS * GROUP) + head)[:, None] * DIM + d[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def tile_shape(block_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows, keys a tile, warps, stages, within the shared memory of an A100 (163 KiB)."""
    if itemsize == 4:
        return (32, 32, 4, 1) if block_dim > 128 else (64, 32, 4, 2)
    if block_dim > 128:
        return 64, 32, 4, 2
    return (128, 64, 8, 2) if block_dim > 64 else (128, 64, 4, 3)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Launch; ``index`` is (block_tables, query_start, context_lens)."""
    tables, query_start, context_lens = index
    count, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = tables.shape[0], heads // kv_heads
    block_dim = next_power_of_2(dim)
    rows, tile, warps, stages = tile_shape(block_dim, q.element_size())
    block_heads = min(group, rows)
    tokens = rows // block_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (count // tokens + sequences, kv_heads * -(-group // block_heads))
    _prefill_kernel[grid](
        q, k_cache, v_cache, out, tables, query_start, context_lens,
        sequences, tables.stride(0), q.stride(0), q.stride(1), scale, softcap,
        kv_heads, group, dim, block_dim, block_heads, tokens, rows, block_size, tile, window,
        softcap > 0, dot_precision(q.device), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
