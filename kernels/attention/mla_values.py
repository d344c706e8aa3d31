"""Latent attention (MLA), what comes behind it: parts merged, values made of latents.

The second kernel of ``squall.kernels.attention.mla_decode``. A part has the mean of its latents,
weighted, and the log2 of the sum of its weights; all parts' means, weighted with these sums, are
multiplied with ``kv_b``, one head and some columns a program.
"""

from typing import NamedTuple

from torch import Tensor

from squall.kernels.attention.mla_query import column_block
from squall.kernels.attention.parts import parts_of
from squall.kernels.attention.tile import dot_precision, padded_dim
from squall.kernels.lang import let_next_come, next_power_of_2, tl, wait_for_last
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, multiprocessors


class Parts(NamedTuple):
    """Results of all parts, and what tells whose they are, as ``part_of`` takes it."""

    means: Tensor  # [slots, H, L]
    lse: Tensor  # f32 [slots, H]
    context_lens: Tensor  # int32 [S]
    batch: int  # S, rounded up
    min_tiles: int
    tile: int


@kernel(do_not_specialize=["sequences", "slots"])
def _mla_values_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    lse_ptr,
    kv_b_ptr,
    out_ptr,
    query_start_ptr,
    context_lens_ptr,
    sequences,
    slots,
    kv_b_head_stride,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of ROWS sequences * heads * blocks of BLOCK_COLUMN values,). ``kv_b_ptr`` is at
    the first head's rows for values."""
    let_next_come(PDL)
    columns: tl.constexpr = (VALUES + BLOCK_COLUMN - 1) // BLOCK_COLUMN
    program = tl.program_id(0)
    head = (program // columns % HEADS).to(tl.int64)
    first = program // (columns * HEADS) * ROWS
    sequence = first + tl.arange(0, ROWS)
    there = sequence < sequences
    c = tl.arange(0, BLOCK_LATENT)
    v = (program % columns) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    w_ptr = kv_b_ptr + head * kv_b_head_stride + v[None, :] * LATENT + c[:, None]
    w_mask = (c < LATENT)[:, None] & (v < VALUES)[None, :]
    if ROWS < 16:
        w = tl.load(w_ptr, mask=w_mask, other=0.0)
    token = tl.load(query_start_ptr + sequence, mask=there, other=0)
    there = there & (tl.load(query_start_ptr + sequence + 1, mask=there, other=0) > token)
    parts, second = parts_of(
        first, context_lens_ptr, sequences, slots, ROWS, BLOCK_SEQS, MIN_TILES, TILE
    )
    parts = tl.where(there, parts, 0)
    wait_for_last(PDL)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_LATENT], dtype=tl.float32)
    for base in range(0, tl.max(parts, axis=0), PARTS):
        part = base + tl.arange(0, PARTS)[None, :]
        slot = tl.where(part == 0, sequence[:, None], second[:, None] + part - 1).to(tl.int64)
        row = slot * HEADS + head
        mask = part < parts[:, None]
        lse = tl.load(lse_ptr + row, mask=mask, other=float("-inf"))
        x = tl.load(
            partial_ptr + row[:, :, None] * LATENT + c[None, None, :],
            mask=mask[:, :, None] & (c < LATENT)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(lse, axis=1))
        # A row without (more) parts: -inf - -inf would be NaN.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - safe)
        weights = tl.exp2(lse - safe[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.sum(x * weights[:, :, None], axis=1)
        peak = new_peak
    merged = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if ROWS == 16:  # there are no registers for it beside so many rows
        w = tl.load(w_ptr, mask=w_mask, other=0.0)
    y = tl.dot(merged.to(w.dtype), w, input_precision=PRECISION).to(out_ptr.dtype.element_ty)
    target = out_ptr + (token.to(tl.int64) * HEADS + head)[:, None] * VALUES + v[None, :]
    tl.store(target, y, mask=there[:, None] & (v < VALUES)[None, :])


def merge_values(parts: Parts, kv_b: Tensor, query_start: Tensor, out: Tensor) -> None:
    """Launch; ``out`` ``[T, H, Dv]`` gets the tokens at ``query_start``, of sequences that have
    one."""
    slots, heads, latent = parts.means.shape
    sequences, values = parts.context_lens.shape[0], out.shape[2]
    rows = min(16, next_power_of_2(sequences))
    blocks = -(-sequences // rows) * heads
    block_value = column_block(values, blocks, multiprocessors(out.device))
    pdl = dependent_launch(out.device)
    _mla_values_kernel[(blocks * -(-values // block_value),)](
        parts.means, parts.lse, kv_b[:, -values:], out, query_start, parts.context_lens, sequences,
        slots, kv_b.stride(0), heads, latent, values, padded_dim(latent), block_value, parts.batch,
        rows, 16 // rows, parts.min_tiles, parts.tile, dot_precision(out.device), bool(pdl),
        num_warps=4 if rows == 1 else 8, **pdl,
    )  # fmt: skip
