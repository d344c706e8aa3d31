"""Latent attention (MLA) for a step that holds prompts and whose lengths the host knows.

``q`` ``[T, H, Dn]`` and ``q_pe`` ``[T, H, R]`` (f32, f16, bf16; tokens and heads may be strided)
are the parts of the queries without and with rotation, ``kv_b`` ``[H, Dn + Dv, L]`` (dense) makes a
head's key and value of a latent, ``cache`` ``[blocks, block_size, 1, L + R]`` (dense) holds the
latents c and the rotated parts of the keys r, this step's included; all of one dtype.
``block_tables``, ``query_start`` and ``context_lens`` are those of ``squall.kernels.attention.
paged``, as is what every query sees; ``query_lens`` and ``contexts`` are the lengths on the host.

    k_j, v_j = kv_b[h] c_j
    out[h] = sum_j w_j v_j / sum_j w_j,   w_j = exp(scale * (q[h] . k_j + q_pe[h] . r_j))

Result: ``[T, H, Dv]``, dense. Rows of tokens outside every sequence are undefined, those of a
sequence without context zeros.

A GPU makes keys and values of all latents of a sequence (gathered from the cache, then one product)
where many tokens share them, in pieces of ``PIECE`` latents at most, the softmax running on from
piece to piece, so that memory is bounded whatever the context. Sequences of few new tokens go
through ``squall.kernels.attention.mla_decode``, token by token.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.attention.mla_decode import build_latents, cached_latents, check
from squall.kernels.attention.mla_decode import decode as decode_latents
from squall.kernels.attention.mla_gather import gather_latents_launcher
from squall.kernels.attention.mla_query import absorbed
from squall.kernels.attention.prefill import sequence_of
from squall.kernels.attention.tile import dot_precision, padded_dim
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.launch import kernel
from squall.kernels.linear import blas
from squall.kernels.op import op
from squall.kernels.tuning import Config, tuned

# An estimate: up to so many tokens, reading latents anew for each costs less than expanding them.
ABSORBED_UP_TO = 32
PIECE = 8192  # latents expanded at a time, a multiple of every block size


def mla_prefill_reference(
    q: Tensor,
    q_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
) -> Tensor:
    """One sequence at a time, scores as a whole matrix, float32."""
    heads, plain = q.shape[1:]
    out = torch.zeros((q.shape[0], heads, kv_b.shape[1] - plain), dtype=q.dtype, device=q.device)
    start = 0
    for s, (length, context) in enumerate(zip(query_lens, contexts, strict=True)):
        rows = slice(start, start + length)
        start += length
        if length == 0 or context == 0:
            continue
        latents = cached_latents(cache, block_tables[s], context).float()
        expanded = torch.einsum("cl,hdl->hcd", latents[:, : kv_b.shape[2]], kv_b.float())
        scores = torch.einsum("nhd,hcd->hnc", q[rows].float(), expanded[..., :plain])
        scores += torch.einsum("nhr,cr->hnc", q_pe[rows].float(), latents[:, kv_b.shape[2] :])
        positions = torch.arange(context - length, context, device=q.device)
        hidden = torch.arange(context, device=q.device) > positions[:, None]
        weights = (scores * scale).masked_fill_(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hnc,hcd->nhd", weights, expanded[..., plain:]).to(q.dtype)
    return out


def _fake(
    q: Tensor,
    q_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
) -> Tensor:
    shape = (*q.shape[:2], kv_b.shape[1] - q.shape[2])
    return torch.empty(shape, dtype=q.dtype, device=q.device)


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


def _expanded(
    queries: Queries, kv_b: Tensor, cache: Tensor, tables: Tensor, contexts: Sequence[int]
) -> None:
    """Attention of sequences whose latents are expanded together, or of one in pieces."""
    total = sum(contexts)
    latent = kv_b.shape[2]
    flat = kv_b.flatten(0, 1)
    spans = [(0, total)]
    if len(contexts) == 1:
        spans = [(first, min(first + PIECE, total)) for first in range(0, total, PIECE)]
    state: Running | None = None
    for first, last in spans:
        latents = gather_latents_launcher(cache, tables, queries.context_lens, first, last)
        kv = blas(latents[:, :latent], flat, None, cache.dtype)
        after = None
        if last < total:
            after = state or Running(*_state(queries.out))
        attend(queries, kv, latents[:, latent:], (first, last), (state, after))
        state = after


def _state(out: Tensor) -> Iterator[Tensor]:
    for shape in (out.shape[:2], out.shape[:2], out.shape):
        yield torch.empty(shape, dtype=torch.float32, device=out.device)


def _token_by_token(queries: Queries, kv_b: Tensor, cache: Tensor, tables: Tensor) -> None:
    """Attention of sequences of few tokens: each token is a sequence of its own."""
    q, q_pe, out, query_start, context_lens, scale, tokens = queries
    lengths = query_start.diff()
    # A token's context, less its place in the step.
    shifts = context_lens - query_start[1:] + 1
    known = {"dim": 0, "output_size": tokens}
    tables = torch.repeat_interleave(tables, lengths, **known)
    shifts = torch.repeat_interleave(shifts, lengths, **known)
    steps = torch.arange(tokens + 1, dtype=torch.int32, device=q.device)
    contexts = (shifts + query_start[0] + steps[:-1]).int()
    decode_latents(absorbed(q, q_pe, kv_b), cache, kv_b, (tables, steps, contexts), scale, out)


def _groups(query_lens: Sequence[int], contexts: Sequence[int]) -> Iterator[tuple[bool, int, int]]:
    """Neighbouring sequences that go together: whether they are expanded, the first, the end.
    Together they have PIECE latents at most, unless they are one."""
    kinds = [length > ABSORBED_UP_TO for length in query_lens]
    first = 0
    for kind, run in itertools.groupby(kinds):
        end = first + len(list(run))
        while first < end:
            stop = first + 1
            while stop < end and (not kind or sum(contexts[first : stop + 1]) <= PIECE):
                stop += 1
            yield kind, first, stop
            first = stop


def mla_prefill_launcher(
    q: Tensor,
    q_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
) -> Tensor:
    check(q, cache, kv_b, block_tables, query_start)
    assert q.stride(2) == q_pe.stride(2) == 1, "heads must be dense"
    assert q_pe.shape[2] == cache.shape[3] - kv_b.shape[2], f"q_pe {q_pe.shape}, {cache.shape}"
    assert len(query_lens) == len(contexts) == block_tables.shape[0], f"{len(query_lens)} lengths"
    shape = (*q.shape[:2], kv_b.shape[1] - q.shape[2])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    starts = [0, *itertools.accumulate(query_lens)]
    for expand, first, end in _groups(query_lens, contexts):
        tokens = starts[end] - starts[first]
        index = query_start[first : end + 1], context_lens[first:end]
        tables = block_tables[first:end]
        if expand:
            queries = Queries(q, q_pe, out, *index, scale, tokens)
            _expanded(queries, kv_b, cache, tables, contexts[first:end])
        elif tokens:
            own = slice(starts[first], starts[end])
            queries = Queries(q[own], q_pe[own], out[own], *index, scale, tokens)
            _token_by_token(queries, kv_b, cache, tables)
    return out


mla_prefill = op(
    "mla_prefill(Tensor q, Tensor q_pe, Tensor kv_b, Tensor cache, Tensor block_tables, "
    "Tensor query_start, Tensor context_lens, int[] query_lens, int[] contexts, float scale) "
    "-> Tensor",
    mla_prefill_reference,
    mla_prefill_launcher,
    _fake,
)


def build_prompts(
    lengths: tuple[tuple[int, int], ...],
    heads: int,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[object, ...]:
    """Arguments for sequences of (query length, context); ``sizes`` are L, Dn, R, Dv."""
    latent, plain, rotary, values = sizes
    cache, *index = build_latents(lengths, latent + rotary, 16, dtype, device)
    tokens = sum(n for n, _ in lengths)
    q = random((tokens, heads, plain + rotary), dtype, device, 91)[..., :plain]
    q_pe = random((tokens, heads, rotary), dtype, device, 92)
    kv_b = random((heads, plain + values, latent), dtype, device, 93) * latent**-0.5
    host = [n for n, _ in lengths], [c for _, c in lengths]
    return q, q_pe, kv_b, cache, *index, *host, (plain + rotary) ** -0.5


def _case(
    name: str,
    lengths: tuple[tuple[int, int], ...],
    heads: int = 3,
    sizes: tuple[int, int, int, int] = (24, 20, 10, 12),
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        return build_prompts(lengths, heads, sizes, dtype, device)

    interpret = sum(c for _, c in lengths) < 500
    reference, launcher = mla_prefill_reference, mla_prefill_launcher
    title = f"mla_prefill-{name}"
    return Case(title, mla_prefill, reference, launcher, build, (), interpret, aot)


_LITE = (512, 128, 64, 128)  # DeepSeek V2, V3
_SHORT = ((1, 40), (5, 60), (33, 33), (0, 20), (70, 90), (1, 3), (2, 2), (40, 40))
_LONG = ((1, 300), (1100, 1100), (1025, 1025), (50, 2900), (7, 900), (2000, 2000))


def _cases() -> Iterator[Case]:
    yield _case("short", _SHORT, aot=BF16)
    yield _case("lite", ((50, 70), (3, 9)), 2, _LITE, aot=BOTH)
    yield _case("one", ((150, 150),), 2, (16, 8, 2, 40))
    yield _case("wide-values", ((40, 45),), 2, (16, 8, 2, 140), aot=BF16)
    yield _case("empty", ())
    yield _case("long", _LONG, 16, _LITE)
    yield _case("pieces", ((300, 20000),), 2, _LITE)


CASES = tuple(_cases())
