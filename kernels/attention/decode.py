"""Paged attention, one query token a sequence: split-KV with GQA packing, one launch.

The query heads that share a kv head are the rows of one tensor-core tile. A sequence's keys are cut
into parts (flash-decoding) that programs work on in parallel; the program that finishes last,
found by an atomic counter, merges them. The grid depends on the batch and on the width of the
block table only: ``slots`` programs a kv head, of which the first S take the first part of every
sequence. The rest take further parts, shared out by every program for itself from
``context_lens``, so that all parts of a batch are about equally long. One CUDA graph thus serves
any mix of context lengths, and programs without a part return at once. Arguments are those of
``squall.kernels.attention.paged``.

Launches on one device must not overlap in time: they share the counters.
"""

import torch
from torch import Tensor

from squall.kernels.attention.fp8 import read, value_as
from squall.kernels.attention.tile import dot_precision, nearest_keys, padded_dim, softcapped
from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.op import dependent_launch, multiprocessors
from squall.kernels.tuning import Config, tuned


@triton.jit
def _tiles(context, TILE: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """First tile with a visible key, and the number of tiles from there on."""
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // TILE
    return first, (context + TILE - 1) // TILE - first


@triton.jit
def _part_of(  # type: ignore[no-untyped-def]
    slot,
    context_lens_ptr,
    sequences,
    slots,
    BLOCK_SEQS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """(sequence, its part, its parts, row of its second part) of a slot; no parts: no work.

    The share of a part is chosen so that the parts beyond each sequence's first, the sum of
    ceil(tiles / share) - 1, fit into the slots beyond the first S.
    """
    if BLOCK_SEQS == 1:
        tiles = _tiles(tl.load(context_lens_ptr), TILE, WINDOW)[1]
        share = tl.maximum((tiles + slots - 1) // slots, MIN_TILES)
        parts = (tiles + share - 1) // share
        sequence = slot * 0
        part = slot
        second = sequence + 1
    else:
        s = tl.arange(0, BLOCK_SEQS)
        contexts = tl.load(context_lens_ptr + s, mask=s < sequences, other=0)
        tiles = _tiles(contexts, TILE, WINDOW)[1]
        more = slots - sequences
        share = tl.maximum((tl.sum(tiles, axis=0) + more - 1) // more, MIN_TILES)
        all_parts = (tiles + share - 1) // share
        further = tl.maximum(all_parts - 1, 0)
        sequence = slot
        if slot >= sequences:
            ends = tl.cumsum(further, axis=0)
            sequence = tl.sum((ends <= slot - sequences).to(tl.int32), axis=0)
        second = sequences + tl.sum(tl.where(s < sequence, further, 0), axis=0)
        parts = tl.sum(tl.where(s == sequence, all_parts, 0), axis=0)
        part = tl.where(slot < sequences, 0, slot - second + 1)
    return sequence, part, tl.where(part < parts, parts, 0), second


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    out_ptr, sinks_ptr, peak, total, acc, token, head, used,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Divide by the sum of weights, with the sink's among them, and write."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=used, other=0.0) * 1.4426950408889634
        highest = tl.maximum(peak, sink)
        decay = tl.exp2(peak - highest)
        total = total * decay + tl.exp2(sink - highest)
        acc = acc * decay[:, None]
    d = tl.arange(0, BLOCK_DIM)
    y = acc / tl.where(used, total, 1.0)[:, None]
    target = out_ptr + (token * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=used[:, None] & (d < DIM)[None, :])


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partial_ptr, lse_ptr, out_ptr, sinks_ptr, sequence, parts, second, token, first_head, end_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh the parts by exp2(lse). Other programs wrote them: read from L2, not from L1."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    used = head < end_head
    d = tl.arange(0, BLOCK_DIM)
    peak = tl.where(used, float("-inf"), 0.0)
    total = tl.zeros([BLOCK_HEADS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=tl.float32)
    for base in range(0, parts, BLOCK_PARTS):
        part = base + tl.arange(0, BLOCK_PARTS)
        slot = tl.where(part == 0, sequence, second + part - 1).to(tl.int64)
        row = slot[None, :] * HEADS + head[:, None]
        there = used[:, None] & (part < parts)[None, :]
        lse = tl.load(lse_ptr + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial_ptr + row[:, :, None] * DIM + d[None, None, :],
            mask=there[:, :, None] & (d < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=1))
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.sum(values * weights[:, :, None], axis=1)
        peak = new_peak
    _finish(out_ptr, sinks_ptr, peak, total, acc, token, head, used, HEADS, DIM, BLOCK_DIM, SINKS)


@triton.jit(do_not_specialize=["sequences", "slots", "table_stride"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    table_ptr,
    query_start_ptr,
    context_lens_ptr,
    sinks_ptr,
    sequences,
    slots,
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
    MERGE_HEADS: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (slots * kv heads * blocks of a group's query heads,); a part's result goes to
    ``partial_ptr`` f32 [slots, H, DIM], the log2 of its sum of weights to ``lse_ptr`` [slots, H],
    unless it is the only one."""
    wait_for_inputs(PDL)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head_blocks: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    program = tl.program_id(0) % (KV_HEADS * head_blocks)
    slot = tl.program_id(0) // (KV_HEADS * head_blocks)
    sequence, part, parts, second = _part_of(
        slot, context_lens_ptr, sequences, slots, BLOCK_SEQS, MIN_TILES, TILE, WINDOW
    )
    kv_head = program // head_blocks
    first_head = kv_head * GROUP + (program % head_blocks) * BLOCK_HEADS
    end_head = tl.minimum(first_head + BLOCK_HEADS, (kv_head + 1) * GROUP)
    d = tl.arange(0, BLOCK_DIM)
    head = first_head + tl.arange(0, BLOCK_HEADS)
    used = head < end_head
    if parts == 0:
        if slot < sequences:
            token = tl.load(query_start_ptr + slot).to(tl.int64)
            if tl.load(query_start_ptr + slot + 1) > token:
                target = out_ptr + (token * HEADS + head)[:, None] * DIM + d[None, :]
                zero = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=out_ptr.dtype.element_ty)
                tl.store(target, zero, mask=used[:, None] & (d < DIM)[None, :])
        return
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) <= token:
        return
    context = tl.load(context_lens_ptr + sequence)
    q_offsets = token * q_token_stride + head[:, None].to(tl.int64) * q_head_stride + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=used[:, None] & (d < DIM)[None, :], other=0.0)

    first_tile, tiles = _tiles(context, TILE, WINDOW)
    start = first_tile + part * tiles // parts
    end = first_tile + (part + 1) * tiles // parts
    first_key = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    table = table_ptr + sequence.to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * DIM
    v_base = v_ptr + kv_head * DIM
    peak = tl.full([BLOCK_HEADS], float("-inf"), dtype=tl.float32)
    # Summed over the tile only in the end: one reduction between warps less for every tile.
    totals = tl.zeros([BLOCK_HEADS, TILE], dtype=tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=tl.float32)
    # Keys out of range are read as the nearest one in range: always finite, then masked.
    near = nearest_keys(start, first_key, context, TILE, WINDOW)
    block = tl.load(table + near // BLOCK_SIZE)
    for tile in range(start, end):
        rows = (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE) * (KV_HEADS * DIM)
        offsets = rows[:, None] + d[None, :]
        # The next tile's blocks are looked up here, so that the loads of its keys wait for nothing.
        near = nearest_keys(tile + 1, first_key, context, TILE, WINDOW)
        block = tl.load(table + near // BLOCK_SIZE)
        if DIM == BLOCK_DIM:
            k = value_as(tl.load(k_base + offsets), q.dtype)
            v = value_as(tl.load(v_base + offsets), q.dtype)
        else:
            k = value_as(tl.load(k_base + offsets, mask=(d < DIM)[None, :], other=0.0), q.dtype)
            v = value_as(tl.load(v_base + offsets, mask=(d < DIM)[None, :], other=0.0), q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = softcapped(scores, scale, softcap, SOFTCAP)
        key = tile * TILE + tl.arange(0, TILE)
        scores = tl.where(((key >= first_key) & (key < context))[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        totals = totals * decay[:, None] + weights
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    total = tl.sum(totals, axis=1)

    if parts == 1:
        _finish(
            out_ptr, sinks_ptr, peak, total, acc, token, head, used, HEADS, DIM, BLOCK_DIM, SINKS
        )
        return
    row = slot.to(tl.int64) * HEADS + head
    mask = used[:, None] & (d < DIM)[None, :]
    tl.store(partial_ptr + row[:, None] * DIM + d[None, :], acc / total[:, None], mask=mask)
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=used)
    # Every thread's stores come before the one thread's release, the merge after its acquire.
    tl.debug_barrier()
    counter = counter_ptr + sequence * (KV_HEADS * head_blocks) + program
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        tl.debug_barrier()
        _merge(
            partial_ptr, lse_ptr, out_ptr, sinks_ptr, sequence, parts, second, token,
            first_head, end_head, HEADS, DIM, BLOCK_DIM, SINKS, MERGE_HEADS, MERGE_PARTS,
        )  # fmt: skip
        tl.store(counter, 0)


def _bucket(n: int) -> int:
    """1, 16, 64, 256, 1024, ...: sizes that are compiled, and tuned, together."""
    return 1 if n == 1 else max(16, 4 ** -(-(n - 1).bit_length() // 2))


def config_key(dim: int, group: int, kv_heads: int, dtype: torch.dtype, batch: int) -> str:
    """The row of a tuning table; ``dtype`` is that of the caches."""
    return f"d{dim}-g{group}-kv{kv_heads}-{8 * dtype.itemsize}bit-b{_bucket(batch)}"


def _rule(block_dim: int, itemsize: int, batch: int) -> Config:
    """Launch parameters; ``itemsize`` is that of the caches. ``programs`` a processor are wanted
    at once, with no part shorter than ``min_keys`` unless a sequence is."""
    tile = max(16, min(64, 16384 // (block_dim * itemsize)))
    programs, min_keys = (2, 128) if batch <= 16 else (4, 256)
    return {"tile": tile, "warps": 4, "stages": 3, "programs": programs, "min_keys": min_keys}


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, int, float],
    sinks: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Launch; ``index`` is (block_tables, query_start, context_lens), ``limits`` (scale, window,
    softcap). Without ``config`` the launch parameters are the tuned ones or follow a rule."""
    tables, query_start, context_lens = index
    scale, window, softcap = limits
    heads, dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = tables.shape[0], heads // kv_heads
    block_dim, batch = padded_dim(dim), _bucket(sequences)
    if config is None:
        key = config_key(dim, group, kv_heads, k_cache.dtype, sequences)
        config = tuned("decode", key, q.device) or _rule(block_dim, k_cache.itemsize, batch)
    tile, warps = config["tile"], config["warps"]
    min_tiles = max(1, config["min_keys"] // tile)
    block_heads = min(64, max(16, next_power_of_2(group)))
    merge_heads = next_power_of_2(min(group, block_heads))
    merge_parts = max(1, min(16, 1024 * warps // (merge_heads * block_dim)))
    programs = kv_heads * -(-group // block_heads)
    wanted = -(-config["programs"] * multiprocessors(q.device) // programs)
    most = -(-tables.shape[1] * block_size // (tile * min_tiles))  # parts of a sequence
    slots = min(wanted, max(1, most))
    if sequences > 1:
        slots = sequences + max(1, min(wanted, sequences * (most - 1)))
    assert sequences * programs <= COUNT, f"{sequences} sequences, {programs} programs each"
    partial = torch.empty((slots, heads, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((slots, heads), dtype=torch.float32, device=q.device)
    pdl = dependent_launch(q.device)
    _decode_kernel[(slots * programs,)](
        q, read(k_cache), read(v_cache), out, partial, lse, counters(q.device), tables,
        query_start, context_lens, lse if sinks is None else sinks, sequences, slots,
        tables.stride(0), q.stride(0), q.stride(1), scale, softcap,
        kv_heads, group, dim, block_dim, block_heads, merge_heads, merge_parts, block_size, batch,
        tile, min_tiles, window, softcap > 0, sinks is not None, dot_precision(q.device),
        bool(pdl), num_warps=warps, num_stages=config["stages"], **pdl,
    )  # fmt: skip
