"""What ``tools/tune.py`` measures of latent attention: heads, batches and contexts."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from squall.kernels.attention import mla_decode, mla_expanded
from squall.kernels.attention.tunables import BLOCK_SIZE, CACHE_BYTES, SHARED_BYTES, indices
from squall.kernels.tuning import Config, Problem, Tunable

LATENT, PLAIN, ROTARY, VALUES = 512, 128, 64, 128  # of all DeepSeek models
HEADS = (16, 128)  # V2 Lite; V2, V3, R1
DTYPE = torch.bfloat16
DECODES = (
    (1, (192, 1024, 4096, 16384)),
    (8, (192, 1024, 8192)),
    (64, (192, 1024, 4096)),
    (256, (192, 1024)),
)
PROMPTS = ((2048, 2048), (512, 8192))  # query length, context


def _decode_problem(heads: int, batch: int, contexts: Sequence[int]) -> Problem:
    width = LATENT + ROTARY

    def build(device: torch.device) -> Callable[[Config], None]:
        blocks = 2 * CACHE_BYTES // (BLOCK_SIZE * width * DTYPE.itemsize)
        cache = torch.randn((blocks, BLOCK_SIZE, 1, width), dtype=DTYPE, device=device)
        q = torch.randn((batch, heads, width), dtype=DTYPE, device=device)
        kv_b = torch.randn((heads, PLAIN + VALUES, LATENT), dtype=DTYPE, device=device)
        out = torch.empty((batch, heads, VALUES), dtype=DTYPE, device=device)
        steps = [itertools.cycle(indices(blocks, batch, 1, n, device)) for n in contexts]

        def run(config: Config) -> None:
            for step in steps:
                mla_decode.decode(q, cache, kv_b, next(step), width**-0.5, out, config)

        return run

    nbytes = batch * sum(contexts) * width * DTYPE.itemsize
    nbytes += len(contexts) * heads * VALUES * LATENT * DTYPE.itemsize
    key = mla_decode.config_key(heads, LATENT, DTYPE, batch)
    return Problem(key, nbytes, build, tuple(_decode_candidates(heads, batch)))


def _decode_candidates(heads: int, batch: int) -> Iterator[Config]:
    """One sequence is shared by as many programs as there are multiprocessors, and more; of many,
    each has a few."""
    rows, itemsize = min(64, heads), DTYPE.itemsize
    least = (32, 64, 128) if batch == 1 else (128, 256, 512)
    warps = (4,) if rows <= 16 else (4, 8)
    spaces = (16, 32, 64), warps, (2, 3, 4), (1, 2), least
    for tile, warp, stages, programs, min_keys in itertools.product(*spaces):
        shared = (rows + (stages - 1) * tile) * (LATENT + ROTARY) * itemsize
        if shared * programs <= SHARED_BYTES:
            yield {
                "tile": tile, "warps": warp, "stages": stages, "programs": programs,
                "min_keys": min_keys,
            }  # fmt: skip


def _prefill_problem(heads: int) -> Problem:
    def build(device: torch.device) -> Callable[[Config], None]:
        runs = []
        for query, context in PROMPTS:
            kv = torch.randn((context, heads, PLAIN + VALUES), dtype=DTYPE, device=device)
            pe = torch.randn((context, ROTARY), dtype=DTYPE, device=device)
            q = torch.randn((query, heads, PLAIN + ROTARY), dtype=DTYPE, device=device)
            out = torch.empty((query, heads, VALUES), dtype=DTYPE, device=device)
            starts, lengths = (
                torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, query], [context])
            )
            scale = (PLAIN + ROTARY) ** -0.5
            parts: tuple[Tensor, Tensor] = q[..., :PLAIN], q[..., PLAIN:]
            queries = mla_expanded.Queries(*parts, out, starts, lengths, scale, query)
            runs.append((queries, kv, pe, (0, context)))

        def run(config: Config) -> None:
            for queries, kv, pe, span in runs:
                mla_expanded.attend(queries, kv, pe, span, config=config)

        return run

    width = heads * (PLAIN + VALUES) + ROTARY
    nbytes = sum(context for _, context in PROMPTS) * width * DTYPE.itemsize
    key = mla_expanded.config_key(PLAIN, VALUES, DTYPE)
    return Problem(key, nbytes, build, tuple(_prefill_candidates()))


def _prefill_candidates() -> Iterator[Config]:
    key, value = PLAIN + ROTARY, VALUES
    for rows, tile, stages in itertools.product((64, 128), (32, 64, 128), (2, 3, 4)):
        shared = DTYPE.itemsize * (rows * key + (stages - 1) * tile * (key + value))
        if shared <= SHARED_BYTES:
            yield {"rows": rows, "tile": tile, "warps": rows // 16, "stages": stages}


def _decode_problems(_: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    for heads, (batch, contexts) in itertools.product(HEADS, DECODES):
        yield _decode_problem(heads, batch, contexts)


def _prefill_problems(_: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    yield _prefill_problem(HEADS[0])


TUNABLES = (Tunable("mla_decode", _decode_problems), Tunable("mla_prefill", _prefill_problems))
