"""Paged attention, one query token a sequence: split-KV with GQA packing, one launch.

The query heads that share a kv head are the rows of one tensor-core tile. A sequence's keys are cut
into parts (flash-decoding) that programs work on in parallel; the program that finishes last,
found by an atomic counter, merges them. The grid depends on the batch and on the width of the
block table only: ``slots`` programs a kv head, of which the first S take the first part of every
sequence. The rest take further parts, shared out by every program for itself from
``context_lens``, so that all parts of a batch are about equally long. One CUDA graph thus serves
any mix of context lengths, and programs without a part return at once. Arguments are those of
``squall.kernels.attention.paged``.

A decode step's queries and newest keys come as they are in qkv (``decode_step``): every program
turns its own queries, and the one with the newest key of a sequence turns and stores that. The
newest key never is read from the cache in the launch that writes it: it opens the running softmax
from registers, so nothing depends on the order of stores and loads.

What says where keys are (lengths, tables, positions), and the older keys, have been written before
the step's first kernel. So with dependent launch, all of it is read, and the first tile brought to
L2, while the product before is still at work.

Launches on one device must not overlap in time: they share the counters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.attention.fp8 import read, stored_as, value_as, written
from squall.kernels.attention.parts import finish, merge, part_of, tiles_of
from squall.kernels.attention.rope import load_angles, load_heads, turned
from squall.kernels.attention.tile import (
    dot_precision,
    first_seen,
    nearest_keys,
    padded_dim,
    softcapped,
)
from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import let_next_come, next_power_of_2, prefetch, tl, wait_for_last
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors
from squall.kernels.tuning import Config, tuned


@kernel(do_not_specialize=["sequences", "slots", "table_stride"])
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
    q_norm_ptr,
    k_norm_ptr,
    positions_ptr,
    angles_ptr,
    places_ptr,
    new_k_ptr,
    new_v_ptr,
    sequences,
    slots,
    table_stride,
    q_token_stride,
    q_head_stride,
    eps,
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
    HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (slots * kv heads * blocks of a group's query heads,); a part's result goes to
    ``partial_ptr`` f32 [slots, H, DIM], the log2 of its sum of weights to ``lse_ptr`` [slots, H],
    unless it is the only one. HALF 0: queries are ready, and the newest key is in the cache."""
    let_next_come(PDL)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head_blocks: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    program = tl.program_id(0) % (KV_HEADS * head_blocks)
    slot = tl.program_id(0) // (KV_HEADS * head_blocks)
    # Of a first part, before it is known to be one: these loads wait for no other.
    token = tl.load(query_start_ptr + tl.minimum(slot, sequences - 1))
    next_token = tl.load(query_start_ptr + tl.minimum(slot, sequences - 1) + 1)
    sequence, context, part, parts, second = part_of(
        slot, context_lens_ptr, sequences, slots, BLOCK_SEQS, MIN_TILES, TILE, WINDOW
    )
    kv_head = program // head_blocks
    first_head = kv_head * GROUP + (program % head_blocks) * BLOCK_HEADS
    end_head = tl.minimum(first_head + BLOCK_HEADS, (kv_head + 1) * GROUP)
    d = tl.arange(0, BLOCK_DIM)
    head = first_head + tl.arange(0, BLOCK_HEADS)
    used = head < end_head
    if parts == 0:
        wait_for_last(PDL)
        if (slot < sequences) & (token < next_token):
            target = out_ptr + (token.to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
            zero = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=out_ptr.dtype.element_ty)
            tl.store(target, zero, mask=used[:, None] & (d < DIM)[None, :])
        return
    if BLOCK_SEQS > 1:  # noqa: SIM102 (known when it is compiled)
        if slot >= sequences:
            token = tl.load(query_start_ptr + sequence)
            next_token = tl.load(query_start_ptr + sequence + 1)
    if next_token <= token:
        wait_for_last(PDL)
        return
    token = token.to(tl.int64)

    first_tile, tiles = tiles_of(context, TILE, WINDOW)
    start = first_tile + part * tiles // parts
    end = first_tile + (part + 1) * tiles // parts
    first_key = tl.maximum(first_seen(context - 1, WINDOW), 0) if WINDOW != 0 else 0
    cached = context
    readable = context
    if HALF > 0:
        # The newest key does not go through the loop; its tile, the last, may hold no other.
        cached = context - 1
        readable = tl.maximum(cached, 1)
        end = start if WINDOW == 1 else tl.minimum(end, (cached + TILE - 1) // TILE)
        if WINDOW < 0:  # the newest key may be the first of its chunk
            end = tl.where(first_key < cached, end, start)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * DIM
    v_base = v_ptr + kv_head * DIM
    # Keys out of range are read as the nearest one in range: always finite, then masked.
    near = nearest_keys(start, first_key, readable, TILE, WINDOW)
    block = tl.load(table + near // BLOCK_SIZE)
    q_row = q_ptr + token * q_token_stride
    if PTX:
        # The loop starts its loads when the query is ready: until then, the first tile comes to L2.
        ROW: tl.constexpr = BLOCK_DIM * k_ptr.dtype.element_ty.primitive_bitwidth // 8
        BYTES: tl.constexpr = ROW if ROW > 128 else 128
        first = (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE) * (KV_HEADS * DIM)
        prefetch(k_base + first[:, None], 0, DIM, BYTES)
        prefetch(v_base + first[:, None], 0, DIM, BYTES)
    if HALF > 0:
        position = tl.load(positions_ptr + token).to(tl.int64)
        place = tl.load(places_ptr + token).to(tl.int64)
        cos, sin = load_angles(angles_ptr + position * (2 * HALF), HALF, BLOCK_DIM)
    wait_for_last(PDL)
    if HALF > 0:
        newest = part == parts - 1
        # The key is turned in every row of a tile like that of q: their product needs no exchange.
        q, q_partner = load_heads(q_row, head, used, DIM, HALF, BLOCK_DIM)
        kv_row = q_row + (HEADS + kv_head) * DIM
        new_k, k_partner = load_heads(kv_row, head * 0, used & newest, DIM, HALF, BLOCK_DIM)
        new_v = tl.load(kv_row + KV_HEADS * DIM + d, mask=newest & (d < DIM), other=0.0)
    else:
        q_place = head[:, None].to(tl.int64) * q_head_stride + d[None, :]
        q = tl.load(q_row + q_place, mask=used[:, None] & (d < DIM)[None, :], other=0.0)
    peak = tl.full([BLOCK_HEADS], float("-inf"), dtype=tl.float32)
    # Summed over the tile only in the end: one reduction between warps less for every tile.
    totals = tl.zeros([BLOCK_HEADS, TILE], dtype=tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], dtype=tl.float32)
    if HALF > 0:
        q = turned(q, q_partner, q_norm_ptr, eps, cos, sin, DIM, HALF, BLOCK_DIM, Q_NORM)
        q = q.to(q_ptr.dtype.element_ty)
        new_k = turned(new_k, k_partner, k_norm_ptr, eps, cos, sin, DIM, HALF, BLOCK_DIM, K_NORM)
        new_k = stored_as(new_k, new_k_ptr.dtype.element_ty)
        new_v = stored_as(new_v.to(tl.float32), new_v_ptr.dtype.element_ty)
        # One of the programs that share a kv head stores for all; none reads what it stores.
        stores = newest & (place >= 0) & (program % head_blocks == 0) & (d < DIM)
        copies = (head * 0)[:, None]
        target = place * (KV_HEADS * DIM) + kv_head * DIM + d
        once = (head == first_head)[:, None] & stores[None, :]
        tl.store(new_k_ptr + target[None, :] + copies, new_k, mask=once)
        tl.store(new_v_ptr + target, new_v, mask=stores)
        if newest & (place < 0):
            place = tl.load(table + cached // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE
            source = (place + cached % BLOCK_SIZE) * (KV_HEADS * DIM) + kv_head * DIM + d
            mask = used[:, None] & (d < DIM)[None, :]
            new_k = tl.load(new_k_ptr + source[None, :] + copies, mask=mask, other=0)
            new_v = tl.load(new_v_ptr + source, mask=d < DIM, other=0)
        products = tl.sum(q.to(tl.float32) * value_as(new_k, q.dtype).to(tl.float32), axis=1)
        peak = tl.where(newest, softcapped(products, scale, softcap, SOFTCAP), peak)
        totals = tl.where(newest & (tl.arange(0, TILE) == 0)[None, :], 1.0, totals)
        acc = tl.where(newest, value_as(new_v, q.dtype).to(tl.float32)[None, :], acc)
    for tile in range(start, end):
        rows = (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE) * (KV_HEADS * DIM)
        offsets = rows[:, None] + d[None, :]
        # The next tile's blocks are looked up here, so that the loads of its keys wait for nothing.
        near = nearest_keys(tile + 1, first_key, readable, TILE, WINDOW)
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
        scores = tl.where(((key >= first_key) & (key < cached))[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        totals = totals * decay[:, None] + weights
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    total = tl.sum(totals, axis=1)

    if parts == 1:
        finish(
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
        merge(
            partial_ptr, lse_ptr, out_ptr, sinks_ptr, sequence, parts, second, token,
            first_head, end_head, HEADS, DIM, BLOCK_DIM, SINKS, MERGE_HEADS, MERGE_PARTS,
        )  # fmt: skip
        tl.store(counter, 0)


class Rope(NamedTuple):
    """What turns queries and keys, as in ``squall.kernels.attention.rope_store``."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    positions: Tensor
    cos_sin: Tensor
    slots: Tensor


def bucket(n: int) -> int:
    """1, 16, 64, 256, 1024, ...: sizes that are compiled, and tuned, together."""
    return 1 if n == 1 else max(16, 4 ** -(-(n - 1).bit_length() // 2))


def config_key(dim: int, group: int, kv_heads: int, dtype: torch.dtype, batch: int) -> str:
    """The row of a tuning table; ``dtype`` is that of the caches."""
    return f"d{dim}-g{group}-kv{kv_heads}-{8 * dtype.itemsize}bit-b{bucket(batch)}"


def _rule(block_dim: int, itemsize: int, batch: int) -> Config:
    """Launch parameters; ``itemsize`` is that of the caches. ``programs`` a processor are wanted
    at once, with no part shorter than ``min_keys`` unless a sequence is."""
    tile = max(16, min(64, 16384 // (block_dim * itemsize)))
    programs, min_keys = (2, 128) if batch <= 16 else (4, 256)
    return {"tile": tile, "warps": 4, "stages": 3, "programs": programs, "min_keys": min_keys}


def slot_count(sequences: int, most: int, wanted: int) -> int:
    """How many parts may be worked on at once, where a sequence has ``most`` of them at most."""
    if sequences == 1:
        return min(wanted, max(1, most))
    return sequences + max(1, min(wanted, sequences * (most - 1)))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, int, float],
    sinks: Tensor | None,
    out: Tensor,
    config: Config | None = None,
    rope: Rope | None = None,
) -> None:
    """Launch; ``index`` is (block_tables, query_start, context_lens), ``limits`` (scale, window,
    softcap). Without ``config`` the launch parameters are the tuned ones or follow a rule.

    With ``rope``, ``q`` is the first part of the rows of qkv as it came out of its product (the kv
    heads are read behind it), and what ``rope_store_kv`` does is done on the way."""
    tables, query_start, context_lens = index
    scale, window, softcap = limits
    heads, dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, group = tables.shape[0], heads // kv_heads
    block_dim, batch = padded_dim(dim), bucket(sequences)
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
    slots = slot_count(sequences, -(-tables.shape[1] * block_size // (tile * min_tiles)), wanted)
    assert sequences * programs <= COUNT, f"{sequences} sequences, {programs} programs each"
    partial = torch.empty((slots, heads, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((slots, heads), dtype=torch.float32, device=q.device)
    unused = Rope(None, None, 0.0, query_start, lse, query_start)
    q_norm, k_norm, eps, positions, cos_sin, places = rope or unused
    pdl = dependent_launch(q.device)
    _decode_kernel[(slots * programs,)](
        q, read(k_cache), read(v_cache), out, partial, lse, counters(q.device), tables,
        query_start, context_lens, lse if sinks is None else sinks,
        lse if q_norm is None else q_norm, lse if k_norm is None else k_norm, positions, cos_sin,
        places, written(k_cache), written(v_cache), sequences, slots, tables.stride(0),
        q.stride(0), q.stride(1), eps, scale, softcap,
        kv_heads, group, dim, block_dim, block_heads, merge_heads, merge_parts, block_size, batch,
        tile, min_tiles, window, softcap > 0, sinks is not None,
        0 if rope is None else cos_sin.shape[1] // 2, q_norm is not None, k_norm is not None,
        dot_precision(q.device), has_ptx(q.device), bool(pdl), num_warps=warps,
        num_stages=config["stages"], **pdl,
    )  # fmt: skip
