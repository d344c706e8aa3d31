"""Paged attention, one query token a sequence: split-KV with GQA packing.

The query heads that share a kv head are the rows of one tensor-core tile. Each sequence's keys
are cut into ``splits`` equal parts (flash-decoding), worked on in parallel and merged by a second
kernel. The grid depends on the batch and on the width of the block table only, and every program
reads its share from ``context_lens``: one CUDA graph serves any context length; a part that has
no keys returns at once. Arguments are those of ``squall.kernels.attention.paged``.
"""

import torch
from torch import Tensor

from squall.kernels.attention.tile import attend_tile, dot_precision
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.op import multiprocessors

MAX_SPLITS = 128


@triton.jit
def _parts(context, TILE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First visible key, first tile, tiles a part, parts in use."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(context - WINDOW, 0)
    first_tile = first_key // TILE
    tiles = (context + TILE - 1) // TILE - first_tile
    share = (tiles + SPLITS - 1) // SPLITS
    used = (tiles + share - 1) // tl.maximum(share, 1)
    return first_key, first_tile, share, used


@triton.jit(do_not_specialize=["table_stride", "q_token_stride"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    peak_ptr,
    table_ptr,
    query_start_ptr,
    context_lens_ptr,
    table_stride,
    q_token_stride,
    q_head_stride,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (sequences, kv heads * blocks of a group's query heads, SPLITS).

    With one split ``out_ptr`` is the result [T, H, DIM]; otherwise the partial results f32
    [S, H, SPLITS, DIM], with ``peak_ptr`` f32 [S, H, SPLITS, 2] holding maximum and sum.
    """
    sequence = tl.program_id(0)
    head_blocks: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_head = tl.program_id(1) // head_blocks
    split = tl.program_id(2)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) <= token:
        return
    context = tl.load(context_lens_ptr + sequence)
    first_key, first_tile, share, used = _parts(context, TILE, WINDOW, SPLITS)
    if SPLITS > 1 and split >= used:
        return

    in_group = (tl.program_id(1) % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_DIM)
    mask = (in_group < GROUP)[:, None] & (d < DIM)[None, :]
    q_offsets = token * q_token_stride + head[:, None].to(tl.int64) * q_head_stride + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0)
    positions = tl.zeros([BLOCK_HEADS], dtype=tl.int32) + (context - 1)
    peak = tl.full([BLOCK_HEADS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_HEADS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=tl.float32)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    start = first_tile + split * share
    end = tl.minimum(start + share, (context + TILE - 1) // TILE)
    for tile in range(start, end):
        peak, total, acc = attend_tile(
            q, peak, total, acc, tile, first_key, context, positions,
            k_ptr + kv_head * DIM, v_ptr + kv_head * DIM, table, scale, softcap,
            DIM, BLOCK_DIM, KV_HEADS * DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, PRECISION, True,
        )  # fmt: skip

    heads: tl.constexpr = KV_HEADS * GROUP
    if SPLITS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        offsets = (token * heads + head)[:, None] * DIM + d[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row = (sequence.to(tl.int64) * heads + head) * SPLITS + split
        tl.store(out_ptr + row[:, None] * DIM + d[None, :], acc, mask=mask)
        tl.store(peak_ptr + row * 2, peak, mask=in_group < GROUP)
        tl.store(peak_ptr + row * 2 + 1, total, mask=in_group < GROUP)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    peak_ptr,
    out_ptr,
    query_start_ptr,
    context_lens_ptr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Grid (sequences, HEADS): weigh the parts by exp2(maximum)."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) <= token:
        return
    context = tl.load(context_lens_ptr + sequence)
    _first_key, _first_tile, _share, used = _parts(context, TILE, WINDOW, SPLITS)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_DIM)
    row = (sequence.to(tl.int64) * HEADS + head) * SPLITS + split
    peak = tl.load(peak_ptr + row * 2, mask=split < used, other=float("-inf"))
    total = tl.load(peak_ptr + row * 2 + 1, mask=split < used, other=0.0)
    highest = tl.max(peak, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(peak - highest)
    mask = (split < used)[:, None] & (d < DIM)[None, :]
    acc = tl.load(partial_ptr + row[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    denominator = tl.sum(weight * total, axis=0)
    result = tl.sum(acc * weight[:, None], axis=0) / tl.where(denominator == 0.0, 1.0, denominator)
    target = out_ptr + (token * HEADS + head) * DIM + d
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=d < DIM)


def tile_size(block_dim: int, itemsize: int) -> int:
    """Keys a tile: two pipelined K and V tiles stay within an A100's shared memory."""
    return max(16, min(64, 16384 // (block_dim * itemsize) * 2))


def split_count(programs: int, tiles: int, processors: int) -> int:
    """Parts (a power of two) so that ``programs`` times them give each processor two programs."""
    wanted = max(1, 2 * processors // max(1, programs))
    wanted = 1 << (wanted.bit_length() - 1)
    return min(wanted, next_power_of_2(max(1, tiles)), MAX_SPLITS)


def decode(
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
    heads, dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = tables.shape[0], heads // kv_heads
    block_dim = next_power_of_2(dim)
    block_heads = min(64, max(16, next_power_of_2(group)))
    tile = tile_size(block_dim, q.element_size())
    programs = kv_heads * -(-group // block_heads)
    tiles = -(-tables.shape[1] * block_size // tile)
    splits = split_count(sequences * programs, tiles, multiprocessors(q.device))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial, peaks = out, out
    if splits > 1:
        shape = (sequences, heads, splits)
        partial = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
        peaks = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    _decode_kernel[(sequences, programs, splits)](
        q, k_cache, v_cache, partial, peaks, tables, query_start, context_lens,
        tables.stride(0), q.stride(0), q.stride(1), scale, softcap,
        kv_heads, group, dim, block_dim, block_heads, block_size, tile, splits, window,
        softcap > 0, dot_precision(q.device), num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(sequences, heads)](
            partial, peaks, out, query_start, context_lens,
            heads, dim, block_dim, tile, splits, window, num_warps=4,
        )  # fmt: skip
    return out
