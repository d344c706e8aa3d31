"""Latent attention (MLA) of single tokens, on the latents as they are in the cache.

``q`` ``[T, H, L + R]`` (f32, f16, bf16; dense) are absorbed queries (``squall.kernels.attention.
mla_query``), ``cache`` ``[blocks, block_size, 1, L + R]`` (dense, of the dtype of ``q``) holds one
key c a token, whose first L elements are its value too, and ``kv_b`` ``[H, Dn + Dv, L]`` (dense)
makes a head's values of them. ``block_tables``, ``query_start`` and ``context_lens`` are those of
``squall.kernels.attention.paged``; a sequence has one query token at most, its last.

    out[h] = kv_b[h, Dn:] (sum_j w_j c_j[:L] / sum_j w_j),   w_j = exp(scale * q[h] . c_j)

over all keys j. Result: ``[T, H, Dv]``, dense. A sequence with no context gives zeros.

Two kernels. The first is multi-query attention: all query heads are rows of a tensor-core tile, and
a tile of latents is loaded once for scores and for values. Keys are cut into parts on a fixed grid
as in ``squall.kernels.attention.decode``. There is one kv head, so the last program of a sequence
would merge all its heads alone, 16 KB a part and more; instead the second kernel does, whose
programs each have a head: it merges the parts, which are of the dtype of ``q``, and multiplies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.attention.decode import bucket, slot_count
from squall.kernels.attention.mla_query import MAX_LATENT
from squall.kernels.attention.mla_values import Parts, merge_values
from squall.kernels.attention.parts import part_of
from squall.kernels.attention.tile import dot_precision, nearest_keys, padded_dim
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import let_next_come, next_power_of_2, prefetch, tl, wait_for_last
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors, op
from squall.kernels.tuning import Config, tuned


def mla_decode_reference(
    q: Tensor,
    cache: Tensor,
    kv_b: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    values: int,
    scale: float,
) -> Tensor:
    out = _fake(q, cache, kv_b, block_tables, query_start, context_lens, values, scale).zero_()
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        if starts[s] == starts[s + 1] or context == 0:
            continue
        keys = cached_latents(cache, block_tables[s], context).float()
        weights = (q[starts[s]].float() @ keys.t() * scale).softmax(-1)
        mixed = (weights @ keys[:, : kv_b.shape[2]]).unsqueeze(-1)
        out[starts[s]] = (kv_b[:, -values:].float() @ mixed).squeeze(-1).to(q.dtype)
    return out


def cached_latents(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first ``length`` latents of a sequence, ``[length, L + R]``."""
    blocks = table[: -(-length // cache.shape[1])].long()
    return cache.index_select(0, blocks).flatten(0, 2)[:length]


def _fake(
    q: Tensor,
    cache: Tensor,
    kv_b: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    values: int,
    scale: float,
) -> Tensor:
    return torch.empty((*q.shape[:2], values), dtype=q.dtype, device=q.device)


@kernel(do_not_specialize=["sequences", "slots", "table_stride"])
def _mla_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    cache_ptr,
    partial_ptr,
    lse_ptr,
    table_ptr,
    query_start_ptr,
    context_lens_ptr,
    sequences,
    slots,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (slots * blocks of BLOCK_HEADS heads,); a part's result goes to ``partial_ptr``
    [slots, H, LATENT], the log2 of its sum of weights to ``lse_ptr`` f32 [slots, H]."""
    let_next_come(PDL)
    head_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    ROW: tl.constexpr = LATENT + ROTARY
    slot = tl.program_id(0) // head_blocks
    sequence, context, part, parts, _second = part_of(
        slot, context_lens_ptr, sequences, slots, BLOCK_SEQS, MIN_TILES, TILE, 0
    )
    if parts == 0:
        wait_for_last(PDL)
        return
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) <= token:
        wait_for_last(PDL)
        return
    tiles = (context + TILE - 1) // TILE
    start = part * tiles // parts
    end = (part + 1) * tiles // parts
    table = table_ptr + sequence.to(tl.int64) * table_stride
    # Keys out of range are read as the nearest one in range: always finite, then masked.
    near = nearest_keys(start, 0, context, TILE, 0)
    block = tl.load(table + near // BLOCK_SIZE)
    if PTX:
        # The newest key may not be there yet; a line of the L2 cache that is written stays right.
        BYTES: tl.constexpr = (
            (BLOCK_LATENT + BLOCK_ROTARY) * cache_ptr.dtype.element_ty.primitive_bitwidth // 8
        )
        LINES: tl.constexpr = 4096 if BYTES > 2048 else 2048 if BYTES > 1024 else 1024
        first = (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE) * ROW
        prefetch(cache_ptr + first[:, None], 0, ROW, LINES)
    head = (tl.program_id(0) % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    used = (head < HEADS)[:, None]
    c = tl.arange(0, BLOCK_LATENT)
    r = tl.arange(0, BLOCK_ROTARY)
    row_ptr = q_ptr + (token * HEADS + head)[:, None] * ROW
    wait_for_last(PDL)
    q = tl.load(row_ptr + c[None, :], mask=used & (c < LATENT)[None, :], other=0.0)
    q_pe = tl.load(row_ptr + LATENT + r[None, :], mask=used & (r < ROTARY)[None, :], other=0.0)
    peak = tl.full([BLOCK_HEADS], float("-inf"), dtype=tl.float32)
    # Summed over the tile only in the end: one reduction between warps less for every tile.
    totals = tl.zeros([BLOCK_HEADS, TILE], dtype=tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_LATENT], dtype=tl.float32)
    for tile in range(start, end):
        key_ptr = cache_ptr + (block.to(tl.int64) * BLOCK_SIZE + near % BLOCK_SIZE)[:, None] * ROW
        # The next tile's blocks are looked up here, so that the loads of its keys wait for nothing.
        near = nearest_keys(tile + 1, 0, context, TILE, 0)
        block = tl.load(table + near // BLOCK_SIZE)
        if LATENT == BLOCK_LATENT:
            latents = tl.load(key_ptr + c[None, :])
        else:
            latents = tl.load(key_ptr + c[None, :], mask=(c < LATENT)[None, :], other=0.0)
        if ROTARY == BLOCK_ROTARY:
            k_pe = tl.load(key_ptr + LATENT + r[None, :])
        else:
            k_pe = tl.load(key_ptr + LATENT + r[None, :], mask=(r < ROTARY)[None, :], other=0.0)
        scores = tl.dot(q_pe, tl.trans(k_pe), input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(latents), scores, input_precision=PRECISION)
        key = tile * TILE + tl.arange(0, TILE)
        scores *= scale * 1.4426950408889634
        scores = tl.where((key < context)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        totals = totals * decay[:, None] + weights
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), latents, acc, input_precision=PRECISION)
        peak = new_peak
    total = tl.sum(totals, axis=1)
    row = slot.to(tl.int64) * HEADS + head
    y = (acc / total[:, None]).to(partial_ptr.dtype.element_ty)
    mask = used & (c < LATENT)[None, :]
    tl.store(partial_ptr + row[:, None] * LATENT + c[None, :], y, mask=mask)
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=head < HEADS)


def config_key(heads: int, latent: int, dtype: torch.dtype, batch: int) -> str:
    """The row of a tuning table."""
    return f"h{heads}-l{latent}-{8 * dtype.itemsize}bit-b{bucket(batch)}"


def _rule(row_bytes: int, heads: int, batch: int) -> Config:
    """Launch parameters for tiles of rows of ``row_bytes``, ``heads`` of them a program.
    ``programs`` a processor are wanted at once, with no part shorter than ``min_keys`` unless a
    sequence is."""
    wide = heads > 16
    tile = 64 if row_bytes <= 512 else 32 if row_bytes <= 1280 else 16
    stages = 2 if wide or batch == 1 or row_bytes > 2048 else 3
    programs, min_keys = (1, 64) if batch == 1 else (1 if wide else 2, 128)
    warps = 8 if wide else 4
    return {
        "tile": tile, "warps": warps, "stages": stages, "programs": programs, "min_keys": min_keys
    }  # fmt: skip


def decode(
    q: Tensor,
    cache: Tensor,
    kv_b: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    scale: float,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Launch both kernels; ``index`` is (block_tables, query_start, context_lens). Without
    ``config`` the launch parameters are the tuned ones or follow a rule."""
    tables, query_start, context_lens = index
    heads, latent = q.shape[1], kv_b.shape[2]
    rotary, block_size, sequences = q.shape[2] - latent, cache.shape[1], tables.shape[0]
    block_latent, block_rotary, batch = padded_dim(latent), padded_dim(rotary), bucket(sequences)
    # A program keeps its queries in shared memory: float32 ones take the room of two.
    block_heads = min(64 if q.itemsize == 2 else 16, max(16, next_power_of_2(heads)))
    if config is None:
        key = config_key(heads, latent, cache.dtype, sequences)
        row_bytes = (block_latent + block_rotary) * cache.itemsize
        config = tuned("mla_decode", key, q.device) or _rule(row_bytes, block_heads, batch)
    tile, processors = config["tile"], multiprocessors(q.device)
    min_tiles = max(1, config["min_keys"] // tile)
    programs = -(-heads // block_heads)
    wanted = -(-config["programs"] * processors // programs)
    most = -(-tables.shape[1] * block_size // (tile * min_tiles))
    slots = slot_count(sequences, most, wanted)
    partial = torch.empty((slots, heads, latent), dtype=q.dtype, device=q.device)
    lse = torch.empty((slots, heads), dtype=torch.float32, device=q.device)
    pdl = dependent_launch(q.device)
    _mla_decode_kernel[(slots * programs,)](
        q, cache, partial, lse, tables, query_start, context_lens, sequences, slots,
        tables.stride(0), scale, heads, latent, rotary, block_latent, block_rotary, block_heads,
        block_size, batch, tile, min_tiles, dot_precision(q.device), has_ptx(q.device), bool(pdl),
        num_warps=config["warps"], num_stages=config["stages"], **pdl,
    )  # fmt: skip
    parts = Parts(partial, lse, context_lens, batch, min_tiles, tile)
    merge_values(parts, kv_b, query_start, out)


def check(
    q: Tensor, cache: Tensor, kv_b: Tensor, block_tables: Tensor, query_start: Tensor
) -> None:
    """What the kernels take for granted."""
    heads, _, latent = kv_b.shape
    assert latent <= MAX_LATENT, f"latents of {latent} elements; {MAX_LATENT} are supported"
    assert q.shape[1] == heads, f"q {q.shape}, kv_b {kv_b.shape}"
    assert cache.shape[2] == 1, f"cache {cache.shape}"
    assert latent < cache.shape[3], f"cache {cache.shape}, latents of {latent}"
    assert q.dtype == cache.dtype == kv_b.dtype, f"{q.dtype}, {cache.dtype}, {kv_b.dtype}"
    assert cache.is_contiguous(), "the cache must be dense"
    assert kv_b.is_contiguous(), "kv_b must be dense"
    assert block_tables.stride(1) == 1, "rows of the block table must be dense"
    assert query_start.shape[0] == block_tables.shape[0] + 1, f"query_start {query_start.shape}"


def mla_decode_launcher(
    q: Tensor,
    cache: Tensor,
    kv_b: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    values: int,
    scale: float,
) -> Tensor:
    check(q, cache, kv_b, block_tables, query_start)
    assert q.shape[2] == cache.shape[3], f"q {q.shape}, cache {cache.shape}"
    assert q.is_contiguous(), "q must be dense"
    out = _fake(q, cache, kv_b, block_tables, query_start, context_lens, values, scale)
    if q.numel() and block_tables.shape[0]:
        decode(q, cache, kv_b, (block_tables, query_start, context_lens), scale, out)
    return out


mla_decode = op(
    "mla_decode(Tensor q, Tensor cache, Tensor kv_b, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, int values, float scale) -> Tensor",
    mla_decode_reference,
    mla_decode_launcher,
    _fake,
)

# (query length, 0 or 1, and context length) of every sequence
Lengths = tuple[tuple[int, int], ...]


def build_latents(
    lengths: Lengths, width: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """(cache, block_tables, query_start, context_lens) for sequences of random latents. Blocks are
    scattered, unused slots and blocks hold NaN, unused table entries are -1."""
    counts = [-(-context // block_size) for _, context in lengths]
    total = sum(counts)
    order = torch.randperm(total + 2, generator=torch.Generator().manual_seed(81))[:total]
    tables = torch.full((len(lengths), max(counts, default=0) + 2), -1, dtype=torch.int32)
    cache = torch.full((total + 2, block_size, 1, width), float("nan"), dtype=dtype)
    for s, (_, context) in enumerate(lengths):
        blocks = order[sum(counts[:s]) : sum(counts[: s + 1])]
        tables[s, : counts[s]] = blocks.int()
        place = torch.arange(context)
        new = random((context, 1, width), dtype, torch.device("cpu"), 82 + s)
        cache[blocks[place // block_size], place % block_size] = new
    starts = torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0).int()
    contexts = torch.tensor([c for _, c in lengths], dtype=torch.int32)
    return tuple(x.to(device) for x in (cache, tables, starts, contexts))


def build_decode(
    lengths: Lengths,
    heads: int,
    sizes: tuple[int, int, int, int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[object, ...]:
    """Arguments; ``sizes`` are L, Dn, R, Dv."""
    latent, plain, rotary, values = sizes
    cache, *index = build_latents(lengths, latent + rotary, block_size, dtype, device)
    tokens = sum(n for n, _ in lengths)
    q = random((tokens, heads, latent + rotary), dtype, device, 83)
    kv_b = random((heads, plain + values, latent), dtype, device, 84)
    return q, cache, kv_b, *index, values, (latent + rotary) ** -0.5


def _case(
    name: str,
    lengths: Lengths,
    heads: int,
    sizes: tuple[int, int, int, int] = (24, 20, 10, 12),
    block_size: int = 16,
    interpret: bool = True,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        return build_decode(lengths, heads, sizes, block_size, dtype, device)

    reference, launcher = mla_decode_reference, mla_decode_launcher
    title = f"mla_decode-{name}"
    return Case(title, mla_decode, reference, launcher, build, (), interpret, aot)


_SOME: Lengths = ((1, 1), (1, 63), (1, 64), (1, 65))
_LITE = (512, 128, 64, 128)  # DeepSeek V2, V3


def _cases() -> Iterator[Case]:
    yield _case("lite-sizes", ((1, 70), (1, 9)), 2, _LITE, 32, aot=BF16)
    yield _case("lite", ((1, 900), (1, 9)), 16, _LITE, 32, interpret=False)
    yield _case("lite-one", ((1, 150),), 16, _LITE, 64, interpret=False, aot=BOTH)
    yield _case("v3", ((1, 40),), 128, _LITE, 64, interpret=False, aot=BF16)
    yield _case("v3-batch", ((1, 33), (1, 5)), 128, _LITE, 32, interpret=False)
    for block_size in (8, 16, 32, 64):
        yield _case(f"block{block_size}", _SOME, 3, block_size=block_size)
    yield _case("70heads", ((1, 30),), 70, (16, 8, 2, 40))
    yield _case("padded", ((1, 20), (1, 0), (0, 0), (0, 9), (1, 3)), 4)
    yield _case("empty", (), 4)
    yield _case("parts", ((1, 700),), 4)
    yield _case("17", tuple((1, 5 + 9 * i) for i in range(17)), 4)
    uneven = ((1, 20000), *((1, 60 + i) for i in range(40)))
    yield _case("uneven", uneven, 16, _LITE, 32, interpret=False)
    wide = tuple((1, 1 + 3 * i) for i in range(150))
    yield _case("wide", wide, 16, _LITE, 32, interpret=False, aot=BF16)
    yield _case("long", ((1, 9000),), 128, _LITE, 64, interpret=False)


CASES = tuple(_cases())
