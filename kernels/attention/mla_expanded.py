"""Latent attention (MLA) of prompts, on keys and values that were made of their latents.

A kernel of ``squall.kernels.attention.mla_prefill``: tiles of query tokens of one head, on dense
keys ``[.., H, Dn + Dv]`` beside their values and on the rotated parts that all heads share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.attention.prefill import sequence_of
from squall.kernels.attention.tile import dot_precision, padded_dim
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.launch import kernel
from squall.kernels.tuning import Config, tuned


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, q_pe, peak, total, acc, first, end, positions, keys, kv_ptr, pe_ptr, scale,
    PLAIN: tl.constexpr, VALUES: tl.constexpr, ROTARY: tl.constexpr, KV_ROW: tl.constexpr,
    PE_ROW: tl.constexpr, BLOCK_PLAIN: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold tiles ``first`` ... ``end`` - 1 of TILE keys into (peak, total, acc) of the rows of
    ``q`` at ``positions`` (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). Without
    MASKED all rows see all these keys."""
    d = tl.arange(0, BLOCK_PLAIN)
    v = tl.arange(0, BLOCK_VALUES)
    r = tl.arange(0, BLOCK_ROTARY)
    for tile in range(first, end):
        key = tile * TILE + tl.arange(0, TILE)
        # Keys out of range are read as the last one: always finite, then masked.
        near = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(kv_ptr + near * KV_ROW + d[None, :], mask=(d < PLAIN)[None, :], other=0.0)
        k_pe = tl.load(pe_ptr + near * PE_ROW + r[None, :], mask=(r < ROTARY)[None, :], other=0.0)
        values = tl.load(
            kv_ptr + PLAIN + near * KV_ROW + v[None, :], mask=(v < VALUES)[None, :], other=0.0
        )
        scores = tl.dot(q_pe, tl.trans(k_pe), input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        scores *= scale * 1.4426950408889634
        if MASKED:
            scores = tl.where(key[None, :] <= positions[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), values, acc, input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc


@kernel(do_not_specialize=["sequences", "first_key", "last_key"])
def _mla_prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    q_pe_ptr,
    kv_ptr,
    pe_ptr,
    out_ptr,
    peak_ptr,
    total_ptr,
    acc_ptr,
    query_start_ptr,
    context_lens_ptr,
    sequences,
    first_key,
    last_key,
    q_token_stride,
    q_head_stride,
    q_pe_token_stride,
    q_pe_head_stride,
    scale,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    VALUES: tl.constexpr,
    ROTARY: tl.constexpr,
    PE_ROW: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GOES_ON: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid ((tokens // ROWS + S) * heads,). Keys and values ``kv_ptr`` [.., HEADS, PLAIN + VALUES],
    and ``pe_ptr`` [.., PE_ROW], are those of all sequences one behind the other, or keys
    ``first_key`` ... ``last_key`` - 1 of one sequence. With GOES_ON the softmax goes on from what
    was kept (f32 [T, H], [T, H], [T, H, VALUES]), without ENDS it is kept."""
    KV_ROW: tl.constexpr = HEADS * (PLAIN + VALUES)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program // HEADS
    head = (program % HEADS).to(tl.int64)
    sequence, first_block = sequence_of(block, query_start_ptr, sequences, ROWS)
    start = tl.load(query_start_ptr + sequence)
    length = tl.load(query_start_ptr + sequence + 1) - start
    first = (block - first_block) * ROWS
    if first >= length:
        return
    context = tl.load(context_lens_ptr + sequence)
    s = tl.arange(0, BLOCK_SEQS)
    before = tl.load(context_lens_ptr + s, mask=s < sequence, other=0)
    offset = tl.sum(before, axis=0).to(tl.int64)
    keys = tl.minimum(context, last_key) - first_key
    token = first + tl.arange(0, ROWS)
    used = token < length
    row = (start + token).to(tl.int64)
    d = tl.arange(0, BLOCK_PLAIN)
    v = tl.arange(0, BLOCK_VALUES)
    r = tl.arange(0, BLOCK_ROTARY)
    q = tl.load(
        q_ptr + row[:, None] * q_token_stride + head * q_head_stride + d[None, :],
        mask=used[:, None] & (d < PLAIN)[None, :],
        other=0.0,
    )
    q_pe = tl.load(
        q_pe_ptr + row[:, None] * q_pe_token_stride + head * q_pe_head_stride + r[None, :],
        mask=used[:, None] & (r < ROTARY)[None, :],
        other=0.0,
    )
    # Among these keys; rows past the end see what the last token sees.
    first_position = context - length + first - first_key
    positions = tl.minimum(first_position + tl.arange(0, ROWS), context - 1 - first_key)
    last_position = tl.minimum(first_position + ROWS, context - first_key) - 1
    place = row * HEADS + head
    state = place[:, None] * VALUES + v[None, :]
    mask = used[:, None] & (v < VALUES)[None, :]
    if GOES_ON:
        peak = tl.load(peak_ptr + place, mask=used, other=0.0)
        total = tl.load(total_ptr + place, mask=used, other=0.0)
        acc = tl.load(acc_ptr + state, mask=mask, other=0.0)
    else:
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, BLOCK_VALUES], dtype=tl.float32)
    kv_head_ptr = kv_ptr + offset * KV_ROW + head * (PLAIN + VALUES)
    pe_row_ptr = pe_ptr + offset * PE_ROW
    open_to = tl.maximum(tl.minimum(first_position + 1, keys), 0) // TILE
    peak, total, acc = _attend(
        q, q_pe, peak, total, acc, 0, open_to, positions, keys, kv_head_ptr, pe_row_ptr, scale,
        PLAIN, VALUES, ROTARY, KV_ROW, PE_ROW, BLOCK_PLAIN, BLOCK_VALUES, BLOCK_ROTARY, TILE,
        PRECISION, False,
    )  # fmt: skip
    end = (tl.maximum(tl.minimum(last_position + 1, keys), 0) + TILE - 1) // TILE
    # Keys past the last one of a piece are masked as if no row saw them.
    positions = tl.minimum(positions, keys - 1)
    peak, total, acc = _attend(
        q, q_pe, peak, total, acc, open_to, end, positions, keys, kv_head_ptr, pe_row_ptr, scale,
        PLAIN, VALUES, ROTARY, KV_ROW, PE_ROW, BLOCK_PLAIN, BLOCK_VALUES, BLOCK_ROTARY, TILE,
        PRECISION, True,
    )  # fmt: skip
    if ENDS:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + state, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(peak_ptr + place, peak, mask=used)
        tl.store(total_ptr + place, total, mask=used)
        tl.store(acc_ptr + state, acc, mask=mask)


def config_key(plain: int, values: int, dtype: torch.dtype) -> str:
    """The row of a tuning table."""
    return f"d{plain}-v{values}-{8 * dtype.itemsize}bit"


def _rule(block_dim: int, itemsize: int) -> Config:
    """Launch parameters within the shared memory of an A100 (163 KiB)."""
    if itemsize == 4:
        rows, tile, warps, stages = 32, 32, 4, 1
    elif block_dim > 128:
        rows, tile, warps, stages = 64, 32, 4, 2
    else:
        rows, tile, warps, stages = 128, 64, 8, 2
    return {"rows": rows, "tile": tile, "warps": warps, "stages": stages}


class Queries(NamedTuple):
    """Of some sequences: both parts of their queries, where results go, and the softmax so far,
    all ``[T, H, ..]`` of the whole step; ``query_start`` and ``context_lens`` are theirs."""

    q: Tensor
    q_pe: Tensor
    out: Tensor
    query_start: Tensor
    context_lens: Tensor
    scale: float
    tokens: int  # at least the sum of their lengths


class Running(NamedTuple):
    """A softmax that is not over: f32 ``[T, H]``, ``[T, H]``, ``[T, H, Dv]``."""

    peak: Tensor
    total: Tensor
    acc: Tensor


def attend(
    queries: Queries,
    kv: Tensor,
    pe: Tensor,
    span: tuple[int, int],
    running: tuple[Running | None, Running | None] = (None, None),
    config: Config | None = None,
) -> None:
    """Launch on expanded keys and values ``[C, H, Dn + Dv]`` (dense) and rotated parts of keys
    ``[C, R]``, of the keys in ``span``. ``running`` are the softmax to go on from and the one to
    leave, None where it begins and where it ends."""
    q, q_pe, out, query_start, context_lens, scale, tokens = queries
    heads, plain = q.shape[1:]
    values, rotary, sequences = out.shape[2], q_pe.shape[2], context_lens.shape[0]
    block_plain, block_values = padded_dim(plain), padded_dim(values)
    if config is None:
        key = config_key(plain, values, q.dtype)
        rule = _rule(max(block_plain, block_values), q.itemsize)
        config = tuned("mla_prefill", key, q.device) or rule
    rows = config["rows"]
    before, after = running
    state = before or after or Running(context_lens, context_lens, context_lens)
    _mla_prefill_kernel[((tokens // rows + sequences) * heads,)](
        q, q_pe, kv, pe, out, *state, query_start, context_lens, sequences, *span, q.stride(0),
        q.stride(1), q_pe.stride(0), q_pe.stride(1), scale, heads, plain, values, rotary,
        pe.stride(0), block_plain, block_values, padded_dim(rotary), next_power_of_2(sequences),
        rows, config["tile"], before is not None, after is None, dot_precision(q.device),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
