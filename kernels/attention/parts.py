"""Parts of a sequence's keys in the decode kernel: who works on which, and how they are merged."""

from squall.kernels.attention.tile import first_seen
from squall.kernels.lang import tl, triton


@triton.jit
def tiles_of(context, TILE: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """First tile with a visible key, and the number of tiles from there on."""
    first = context * 0
    if WINDOW != 0:
        first = tl.maximum(first_seen(context - 1, WINDOW), 0) // TILE
    return first, (context + TILE - 1) // TILE - first


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    context_lens_ptr, sequences, slots, BLOCK_SEQS: tl.constexpr, MIN_TILES: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles of a part, and the parts beyond the first of every sequence, [BLOCK_SEQS]: their sum
    fits into the slots beyond the first S."""
    s = tl.arange(0, BLOCK_SEQS)
    contexts = tl.load(context_lens_ptr + s, mask=s < sequences, other=0)
    tiles = tiles_of(contexts, TILE, WINDOW)[1]
    more = slots - sequences
    share = tl.maximum((tl.sum(tiles, axis=0) + more - 1) // more, MIN_TILES)
    return share, tl.maximum((tiles + share - 1) // share - 1, 0)


@triton.jit
def part_of(  # type: ignore[no-untyped-def]
    slot,
    context_lens_ptr,
    sequences,
    slots,
    BLOCK_SEQS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """(sequence, its context, its part, its parts, row of its second part) of a slot; no parts: no
    work.

    The share of a part is chosen so that the parts beyond each sequence's first, the sum of
    ceil(tiles / share) - 1, fit into the slots beyond the first S.
    """
    if BLOCK_SEQS == 1:
        sequence = slot * 0
        context = tl.load(context_lens_ptr)
        tiles = tiles_of(context, TILE, WINDOW)[1]
        share = tl.maximum((tiles + slots - 1) // slots, MIN_TILES)
        part = slot
        second = sequence + 1
    else:
        s = tl.arange(0, BLOCK_SEQS)
        share, further = _shares(
            context_lens_ptr, sequences, slots, BLOCK_SEQS, MIN_TILES, TILE, WINDOW
        )
        sequence = slot
        if slot >= sequences:
            ends = tl.cumsum(further, axis=0)
            sequence = tl.sum((ends <= slot - sequences).to(tl.int32), axis=0)
        context = tl.load(context_lens_ptr + sequence, mask=sequence < sequences, other=0)
        tiles = tiles_of(context, TILE, WINDOW)[1]
        second = sequences + tl.sum(tl.where(s < sequence, further, 0), axis=0)
        part = tl.where(slot < sequences, 0, slot - second + 1)
    parts = (tiles + share - 1) // share
    return sequence, context, part, tl.where(part < parts, parts, 0), second


@triton.jit
def parts_of(  # type: ignore[no-untyped-def]
    first, context_lens_ptr, sequences, slots, ROWS: tl.constexpr, BLOCK_SEQS: tl.constexpr,
    MIN_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What ``part_of`` gives to ROWS sequences from ``first`` on (without windows): their parts,
    and the rows of their second ones; the row of a first part is the sequence's number."""
    sequence = first + tl.arange(0, ROWS)
    context = tl.load(context_lens_ptr + sequence, mask=sequence < sequences, other=0)
    tiles = (context + TILE - 1) // TILE
    if BLOCK_SEQS == 1:
        share = tl.maximum((tiles + slots - 1) // slots, MIN_TILES)
        parts = (tiles + share - 1) // share
        second = sequence + 1
    else:
        share, all_further = _shares(
            context_lens_ptr, sequences, slots, BLOCK_SEQS, MIN_TILES, TILE, 0
        )
        parts = (tiles + share - 1) // share
        further = tl.maximum(parts - 1, 0)
        before = tl.sum(tl.where(tl.arange(0, BLOCK_SEQS) < first, all_further, 0), axis=0)
        second = sequences + before + tl.cumsum(further, axis=0) - further
    return parts, second


@triton.jit
def finish(  # type: ignore[no-untyped-def]
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
def merge(  # type: ignore[no-untyped-def]
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
    finish(out_ptr, sinks_ptr, peak, total, acc, token, head, used, HEADS, DIM, BLOCK_DIM, SINKS)
