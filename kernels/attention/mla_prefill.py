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

import torch
from torch import Tensor

from squall.kernels.attention.mla_decode import build_latents, cached_latents, check
from squall.kernels.attention.mla_decode import decode as decode_latents
from squall.kernels.attention.mla_expanded import Queries, Running, attend
from squall.kernels.attention.mla_gather import gather_latents_launcher
from squall.kernels.attention.mla_query import absorbed
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.linear import blas
from squall.kernels.op import op

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
    yield _case("lite", ((50, 70), (40, 40)), 2, _LITE, aot=BOTH)
    yield _case("one", ((150, 150),), 2, (16, 8, 2, 40))
    yield _case("wide-values", ((40, 45),), 2, (16, 8, 2, 140))
    yield _case("empty", ())
    yield _case("long", _LONG, 16, _LITE)
    yield _case("pieces", ((300, 20000),), 2, _LITE)


CASES = tuple(_cases())
