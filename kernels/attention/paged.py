"""Causal attention over a paged KV cache, for packed sequences of any query lengths.

``q`` ``[T, H, D]`` (f32, f16, bf16; tokens and heads may be strided, D is dense and at most 256),
``k_cache``, ``v_cache`` ``[blocks, block_size, KV, D]`` (dense; f32, f16, bf16 or float8_e4m3fn,
read as the dtype of ``q``), ``block_tables`` int32 ``[S, B]``, ``query_start`` int32 ``[S + 1]``,
``context_lens`` int32 ``[S]``. Query i of sequence s is at position ``p = context_lens[s] - length
+ i``; its keys, this step's included, are already in the cache. Query head h reads kv head
``h // (H / KV)``.

    out = sum_j w_j v_j / sum_j w_j,   w_j = exp(cap(scale * q . k_j))
                              over the keys first <= j <= p

``window`` says which key is the first (``squall.kernels.attention.window``).

``softcap`` c > 0 turns a score z into ``c * tanh(z / c)`` (Gemma 2); 0 is none.
``sinks`` float32 ``[H]`` adds ``exp(sinks[h])`` to the denominator of head h (GPT-OSS).
Block-table entries past a sequence's blocks, or before its first key, and cache slots past its
context are never read. A sequence with no context gives zeros; rows of ``q`` outside every
sequence are undefined. ``max_query_len`` and ``max_context_len`` bound the lengths on the host:
1 query token at most takes the decode kernel. Result: ``[T, H, D]`` like ``q``, dense.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from squall.kernels.attention.decode import decode
from squall.kernels.attention.prefill import prefill
from squall.kernels.attention.tile import MAX_HEAD_DIM
from squall.kernels.attention.window import first_key
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.op import op


def _visible(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """Boolean [queries, keys]."""
    visible = keys <= positions[:, None]
    return visible & (keys >= first_key(positions, window)[:, None])


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence at a time, scores as a whole matrix, float32."""
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end or context == 0:
            continue
        first = max(0, first_key(context - (end - begin), window))
        low = first // block_size
        blocks = block_tables[s, low : -(-context // block_size)].long()
        used = slice(first - low * block_size, context - low * block_size)
        k, v = (
            cache.index_select(0, blocks).flatten(0, 1)[used].to(q.dtype).float()
            for cache in (k_cache, v_cache)
        )
        rows = q[begin:end].float().reshape(end - begin, kv_heads, -1, q.shape[2])
        scores = torch.einsum("nkgd,ckd->kgnc", rows, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(context - (end - begin), context, device=q.device)
        keys = torch.arange(first, context, device=q.device)
        scores.masked_fill_(~_visible(positions, keys, window), float("-inf"))
        if sinks is not None:
            sink = sinks.view(kv_heads, -1, 1, 1).expand(-1, -1, end - begin, 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., : keys.shape[0]]
        values = torch.einsum("kgnc,ckd->nkgd", weights, v)
        out[begin:end] = values.flatten(1, 2).to(q.dtype)
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    sinks: Tensor | None,
) -> None:
    """What the kernels take for granted."""
    heads, dim = q.shape[1:]
    assert dim <= MAX_HEAD_DIM, f"heads of {dim} elements; {MAX_HEAD_DIM} are supported"
    assert q.stride(2) == 1, "heads must be dense"
    for cache in (k_cache, v_cache):
        assert cache.shape[3] == dim, f"q {q.shape}, cache {cache.shape}"
        assert cache.is_contiguous(), "the caches must be dense"
    assert heads % k_cache.shape[2] == 0, f"{heads} heads on {k_cache.shape[2]} kv heads"
    assert block_tables.stride(1) == 1, "rows of the block table must be dense"
    assert query_start.shape[0] == block_tables.shape[0] + 1, f"query_start {query_start.shape}"
    assert sinks is None or sinks.dtype == torch.float32, f"sinks {sinks.dtype}"


def paged_attention_launcher(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    check(q, k_cache, v_cache, block_tables, query_start, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or block_tables.shape[0] == 0:
        return out
    index, limits = (block_tables, query_start, context_lens), (scale, window, softcap)
    if max_query_len == 1:
        decode(q, k_cache, v_cache, index, limits, sinks, out)
    else:
        prefill(q, k_cache, v_cache, index, limits, sinks, out, q.shape[0])
    return out


paged_attention = op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor query_start, Tensor context_lens, int max_query_len, int max_context_len, "
    "float scale, int window, float softcap, Tensor? sinks) -> Tensor",
    paged_attention_reference,
    paged_attention_launcher,
    _fake,
)

# (query length, context length) of every sequence; a batch of decodes, prefills or both.
Lengths = tuple[tuple[int, int], ...]


def build_batch(
    lengths: Lengths,
    shape: tuple[int, int, int],
    block_size: int,
    limits: tuple[int, float],
    dtype: torch.dtype,
    device: torch.device,
    options: str = "",
) -> tuple[Any, ...]:
    """Arguments for sequences of random tokens; ``shape`` is (heads, kv heads, dim), ``limits``
    (window, softcap), ``options`` "fp8" (caches), "sinks" or both. Blocks are scattered, unused
    slots and blocks hold NaN, table entries that are unused or before the first key are -1 (on a
    CPU there is NaN too), and q is a strided slice."""
    heads, kv_heads, dim = shape
    counts = [-(-context // block_size) for _, context in lengths]
    total, width = sum(counts), max(counts, default=0) + 2
    order = torch.randperm(total + 2, generator=torch.Generator().manual_seed(41))[:total]
    tables = torch.full((len(lengths), width), -1, dtype=torch.int32)
    kept = torch.float8_e4m3fn if "fp8" in options else dtype
    room = (total + 3, block_size, kv_heads, dim)
    caches = [torch.full(room, float("nan")).to(kept)[1:] for _ in range(2)]
    used = 0
    cpu = torch.device("cpu")
    for s, (new, context) in enumerate(lengths):
        blocks = order[used : used + counts[s]]
        used += counts[s]
        tables[s, : counts[s]] = blocks.int()
        slots = torch.arange(context)
        for c, cache in enumerate(caches):
            kv = random((context, kv_heads, dim), dtype, cpu, 50 + 2 * s + c)
            cache[blocks[slots // block_size], slots % block_size] = kv.to(kept)
        if limits[0]:
            gone = max(0, first_key(context - new, limits[0])) // block_size
            tables[s, :gone] = -1
            for cache in caches:
                cache[blocks[:gone]] = torch.full((), float("nan")).to(kept)
    queries = [n for n, _ in lengths]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tokens = sum(queries)
    q = random((tokens, heads + 2 * kv_heads, dim), dtype, device, 42)[:, :heads]
    contexts = torch.tensor([c for _, c in lengths], dtype=torch.int32)
    index = (tables.to(device), starts.to(device), contexts.to(device))
    longest = max((c for _, c in lengths), default=0)
    sinks = random((heads,), torch.float32, device, 43) if "sinks" in options else None
    return (
        q, caches[0].to(device), caches[1].to(device), *index,
        max(queries, default=0), longest, dim**-0.5, *limits, sinks,
    )  # fmt: skip


def _case(
    name: str,
    lengths: Lengths,
    shape: tuple[int, int, int],
    block_size: int = 16,
    limits: tuple[int, float] = (0, 0.0),
    options: str = "",
    interpret: bool = True,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return build_batch(lengths, shape, block_size, limits, dtype, device, options)

    title = f"paged_attention-{name}"
    reference, launcher = paged_attention_reference, paged_attention_launcher
    return Case(title, paged_attention, reference, launcher, build, interpret=interpret, aot=aot)


_DECODE: Lengths = ((1, 1), (1, 63), (1, 64), (1, 65))
_MIXED: Lengths = ((5, 5), (1, 33), (3, 20), (1, 1))


def _cases() -> Iterator[Case]:
    for dim in (64, 80, 96, 128, 192, 256):
        aot = {64: BF16, 128: BF16, 256: BOTH}.get(dim, ())
        yield _case(f"decode-d{dim}", ((1, 65), (1, 7)), (4, 2, dim), aot=aot)
        yield _case(f"prefill-d{dim}", ((9, 9), (2, 40)), (4, 2, dim), aot=aot)
    for heads, kv_heads in ((2, 2), (9, 3), (4, 1), (7, 1), (40, 2)):
        name = f"{heads}on{kv_heads}"
        yield _case(f"decode-{name}", ((1, 17), (1, 50)), (heads, kv_heads, 16))
        yield _case(f"prefill-{name}", ((11, 30),), (heads, kv_heads, 16))
    for block_size in (8, 32, 64):
        yield _case(f"decode-block{block_size}", _DECODE, (2, 1, 16), block_size)
        yield _case(f"prefill-block{block_size}", _MIXED, (2, 1, 16), block_size)
    yield _case("decode-window", _DECODE, (4, 2, 16), 8, limits=(20, 0.0), aot=BF16)
    yield _case("decode-window1", _DECODE, (4, 2, 16), 8, limits=(1, 0.0))
    yield _case("prefill-window", _MIXED, (4, 2, 16), 8, limits=(4, 0.0), aot=BF16)
    yield _case("decode-chunk", _DECODE, (4, 2, 16), 8, limits=(-32, 0.0), aot=BF16)
    yield _case("decode-chunk1", _DECODE, (4, 2, 16), 8, limits=(-1, 0.0))
    yield _case("prefill-chunk", _MIXED, (4, 2, 16), 8, limits=(-4, 0.0), aot=BF16)
    yield _case("prefill-chunk-odd", _MIXED, (4, 2, 16), 8, (-7, 3.0), "sinks fp8")
    yield _case("decode-softcap", _DECODE, (4, 2, 16), limits=(0, 3.0), aot=BF16)
    yield _case("prefill-softcap", _MIXED, (4, 2, 16), limits=(30, 3.0), aot=BF16)
    yield _case("decode-fp8", _DECODE, (4, 2, 16), options="fp8", aot=BF16)
    yield _case("prefill-fp8", _MIXED, (4, 2, 16), options="fp8", aot=BF16)
    yield _case("decode-sinks", _DECODE, (4, 2, 16), options="sinks", aot=BF16)
    yield _case("prefill-sinks", _MIXED, (4, 2, 16), 8, (5, 0.0), "sinks", aot=BF16)
    yield _case("empty", (), (4, 2, 16))
    yield _case("decode-padded", ((1, 20), (1, 0), (0, 0), (1, 3)), (4, 2, 16))
    yield _case("prefill-padded", ((6, 6), (0, 0), (0, 9), (2, 2)), (4, 2, 16))
    yield _case("prefill-tiles", ((150, 150), (70, 200), (1, 130)), (4, 2, 16))
    chunked: Lengths = ((150, 150), (70, 200), (65, 65))
    yield _case("prefill-tiles-chunk", chunked, (4, 2, 16), limits=(-64, 0.0))
    wide = tuple((1, 1 + 3 * i) for i in range(150))
    yield _case("decode-wide", wide, (8, 2, 64), interpret=False, aot=BF16)
    uneven = ((1, 20000), *((1, 60 + i) for i in range(40)))
    yield _case("decode-uneven", uneven, (8, 2, 64), 32, options="sinks", interpret=False)
    yield _case("decode-parts", ((1, 600),), (4, 2, 16), aot=BF16)
    yield _case("decode-long", ((1, 5000), (1, 1000)), (9, 3, 64), 32, interpret=False)
    yield _case("decode-long-fp8", ((1, 5000),), (8, 2, 128), 32, options="fp8", interpret=False)
    yield _case("decode-long-window", ((1, 3000),), (8, 2, 128), 32, (512, 0.0), interpret=False)
    yield _case("decode-long-chunk", ((1, 3000),), (8, 2, 128), 32, (-1024, 0.0), interpret=False)
    yield _case("prefill-long", ((1000, 1000), (63, 2000), (1, 999)), (9, 3, 64), interpret=False)
    yield _case("prefill-long-window", ((700, 900),), (8, 4, 128), 32, (256, 50.0), interpret=False)
    yield _case("prefill-long-chunk", ((700, 900),), (8, 4, 128), 32, (-300, 0.0), interpret=False)


CASES = tuple(_cases())
