"""What ``tools/tune.py`` measures of the attention kernels: head layouts, batches and contexts."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from squall.kernels.attention import decode, prefill
from squall.kernels.attention.rope_store import rotary_table
from squall.kernels.lang import next_power_of_2
from squall.kernels.tuning import Config, Problem, Tunable

BLOCK_SIZE = 32
CACHE_BYTES = 1 << 28  # of K and of V: several times an L2 cache
SHARED_BYTES = 220 * 1024
# A kernel with more than 48 KiB takes L1 from the GEMVs beside it: a step of 8B Llama in bf16 took
# 5.9 instead of 5.2 ms on an H100.
L1_KEPT_BYTES = 40 * 1024

# (query heads, kv heads, head dimension): 8B Llama, Mistral and Qwen3; 1B Llama; 7B Qwen2.5.
LAYOUTS = ((32, 8, 128), (32, 8, 64), (32, 4, 128), (28, 4, 128), (32, 32, 96))
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# Batch and contexts of one problem: launch parameters serve every context of a batch bucket.
DECODES = (
    (1, (192, 1024, 4096, 16384)),
    (8, (192, 1024, 8192)),
    (32, (192, 1024, 4096)),
    (128, (192, 1024)),
    (512, (192,)),
)
PREFILLS = ((2048, 2048), (512, 8192))  # query length, context

Layout = tuple[int, int, int]
Index = tuple[Tensor, Tensor, Tensor]


def _caches(layout: Layout, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    _, kv_heads, dim = layout
    shape = (CACHE_BYTES // (BLOCK_SIZE * kv_heads * dim * dtype.itemsize), BLOCK_SIZE)
    k, v = (
        torch.randn((*shape, kv_heads, dim), dtype=torch.bfloat16, device=device).to(dtype)
        for _ in range(2)
    )
    return k, v


def indices(blocks: int, batch: int, query: int, context: int, device: torch.device) -> list[Index]:
    """(block_tables, query_start, context_lens) as often as the caches allow, of other blocks each
    time."""
    used = -(-context // BLOCK_SIZE)
    copies = max(1, blocks // (batch * used))
    count = copies * batch * used
    if count <= blocks:
        order = torch.randperm(blocks, device=device)[:count]
    else:
        order = torch.randint(blocks, (count,), device=device)
    tables = torch.full((copies, batch, max(used, 512)), -1, dtype=torch.int32, device=device)
    tables[..., :used] = order.view(copies, batch, used)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    return [(table, starts, lengths) for table in tables]


def _rope(index: Index, context: int, angles: Tensor) -> decode.Rope:
    """What turns and stores the last key of every sequence."""
    tables, _, lengths = index
    last = context - 1
    slots = tables[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    return decode.Rope(None, None, 1e-6, lengths - 1, angles, slots)


def _decode_problem(
    layout: Layout, dtype: torch.dtype, batch: int, contexts: Sequence[int]
) -> Problem:
    heads, kv_heads, dim = layout

    def build(device: torch.device) -> Callable[[Config], None]:
        k, v = _caches(layout, dtype, device)
        shape = (batch, heads + 2 * kv_heads, dim)
        q = torch.randn(shape, dtype=torch.bfloat16, device=device)[:, :heads]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        angles = rotary_table(max(contexts), dim).to(device)
        limits = dim**-0.5, 0, 0.0
        steps = []
        for n in contexts:
            found = indices(k.shape[0], batch, 1, n, device)
            steps.append(itertools.cycle([(index, _rope(index, n, angles)) for index in found]))

        def run(config: Config) -> None:
            for step in steps:
                index, rope = next(step)
                decode.decode(q, k, v, index, limits, None, out, config, rope)

        return run

    nbytes = 2 * batch * sum(contexts) * kv_heads * dim * dtype.itemsize
    key = decode.config_key(dim, heads // kv_heads, kv_heads, dtype, batch)
    row = next_power_of_2(dim) * dtype.itemsize
    return Problem(key, nbytes, build, tuple(_decode_candidates(row, batch)))


def _decode_candidates(row: int, batch: int) -> Iterator[Config]:
    """One sequence is worked on by few programs with much in flight; of many, each has a program,
    and as many of these at a time as the GPU has room for."""
    spaces: tuple[tuple[int, ...], ...]
    if batch == 1:
        spaces = (64, 128), (4,), (2, 3), (1, 2), (64, 128, 256)
    elif batch <= 8:
        spaces = (32, 64), (2, 4), (2, 3, 4), (2,), (64, 128, 256)
    else:
        spaces = (16, 32, 64), (1, 2, 4), (2, 3, 4), (4,), (256,)
    for tile, warps, stages, programs, min_keys in itertools.product(*spaces):
        # More programs than fit at once only add partial results to merge.
        wanted = programs if 1 < batch <= 8 else 1
        most = L1_KEPT_BYTES if batch == 1 else SHARED_BYTES
        if 2 * (stages - 1) * tile * row * wanted <= most and tile >= 8 * warps:
            yield {
                "tile": tile, "warps": warps, "stages": stages, "programs": programs,
                "min_keys": min_keys,
            }  # fmt: skip


def _prefill_problem(layout: Layout, dtype: torch.dtype) -> Problem:
    heads, kv_heads, dim = layout

    def build(device: torch.device) -> Callable[[Config], None]:
        k, v = _caches(layout, dtype, device)
        runs = []
        for query, context in PREFILLS:
            q = torch.randn((query, heads, dim), dtype=torch.bfloat16, device=device)
            found = itertools.cycle(indices(k.shape[0], 1, query, context, device))
            runs.append((q, torch.empty_like(q), found))

        def run(config: Config) -> None:
            for q, out, index in runs:
                limits = (dim**-0.5, 0, 0.0)
                prefill.prefill(q, k, v, next(index), limits, None, out, q.shape[0], config)

        return run

    nbytes = 2 * sum(context for _, context in PREFILLS) * kv_heads * dim * dtype.itemsize
    key = prefill.config_key(dim, heads // kv_heads, dtype)
    return Problem(key, nbytes, build, tuple(_prefill_candidates(next_power_of_2(dim))))


def _prefill_candidates(block_dim: int) -> Iterator[Config]:
    for rows, tile, stages in itertools.product((64, 128), (32, 64, 128), (2, 3, 4)):
        if 2 * block_dim * (rows + 2 * stages * tile) <= SHARED_BYTES:
            yield {"rows": rows, "tile": tile, "warps": rows // 16, "stages": stages}


def _decode_problems(_: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        for batch, contexts in DECODES:
            yield _decode_problem(layout, dtype, batch, contexts)


def _prefill_problems(_: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        yield _prefill_problem(layout, dtype)


TUNABLES = (Tunable("decode", _decode_problems), Tunable("prefill", _prefill_problems))
