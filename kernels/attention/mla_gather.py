"""The latents of some sequences, read from the paged cache into one dense tensor.

``cache`` ``[blocks, block_size, 1, W]`` (dense; f32, f16, bf16), ``tables`` int32 ``[S, B]`` (rows
dense) and ``context_lens`` int32 ``[S]`` as in ``squall.kernels.attention.paged``. Keys ``first``
(a multiple of the block size) ... ``last`` - 1 of every sequence, as far as it has them, the
sequences one behind the other: either all keys of all (``first`` 0, ``last`` the sum of the
contexts), or some of one. Result: ``[last - first, W]``, dense.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.attention.mla_decode import build_latents, cached_latents
from squall.kernels.cases import BF16, Case
from squall.kernels.lang import next_power_of_2, tl
from squall.kernels.launch import kernel
from squall.kernels.op import op


def gather_latents_reference(
    cache: Tensor, tables: Tensor, context_lens: Tensor, first: int, last: int
) -> Tensor:
    rows = [
        cached_latents(cache, table, min(context, last))[first:]
        for table, context in zip(tables, context_lens.tolist(), strict=True)
    ]
    return torch.cat(rows)


def _fake(cache: Tensor, tables: Tensor, context_lens: Tensor, first: int, last: int) -> Tensor:
    return torch.empty((last - first, cache.shape[3]), dtype=cache.dtype, device=cache.device)


@kernel(do_not_specialize=["first", "last", "table_stride"])
def _gather_latents_kernel(  # type: ignore[no-untyped-def]
    cache_ptr, out_ptr, table_ptr, context_lens_ptr, first, last, table_stride,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SEQS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the longest sequence, S, parts of a block's BLOCK_SIZE * WIDTH elements)."""
    place = tl.program_id(0)
    sequence = tl.program_id(1)
    end = tl.minimum(tl.load(context_lens_ptr + sequence), last) - first
    if place * BLOCK_SIZE >= end:
        return
    s = tl.arange(0, BLOCK_SEQS)
    before = tl.sum(tl.load(context_lens_ptr + s, mask=s < sequence, other=0), axis=0)
    entry = sequence.to(tl.int64) * table_stride + first // BLOCK_SIZE + place
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    key = place * BLOCK_SIZE + element // WIDTH
    mask = (element < BLOCK_SIZE * WIDTH) & (key < end)
    source = tl.load(table_ptr + entry).to(tl.int64) * (BLOCK_SIZE * WIDTH) + element
    target = (before + place * BLOCK_SIZE).to(tl.int64) * WIDTH + element
    tl.store(out_ptr + target, tl.load(cache_ptr + source, mask=mask, other=0.0), mask=mask)


def gather_latents_launcher(
    cache: Tensor, tables: Tensor, context_lens: Tensor, first: int, last: int
) -> Tensor:
    sequences, block_size, width = tables.shape[0], cache.shape[1], cache.shape[3]
    assert cache.shape[2] == 1, f"cache {cache.shape}"
    assert cache.is_contiguous(), "the cache must be dense"
    assert tables.stride(1) == 1, "rows of the table must be dense"
    assert first % block_size == 0, f"from key {first} on, blocks of {block_size}"
    assert first == 0 or sequences == 1, f"from key {first} on, {sequences} sequences"
    out = _fake(cache, tables, context_lens, first, last)
    if last == first:
        return out
    blocks = min(tables.shape[1], -(-last // block_size)) - first // block_size
    block = 4096
    _gather_latents_kernel[(blocks, sequences, -(-block_size * width // block))](
        cache, out, tables, context_lens, first, last, tables.stride(0), block_size, width,
        next_power_of_2(sequences), block, num_warps=4,
    )  # fmt: skip
    return out


gather_latents = op(
    "gather_latents(Tensor cache, Tensor tables, Tensor context_lens, int first, int last) "
    "-> Tensor",
    gather_latents_reference,
    gather_latents_launcher,
    _fake,
)


def _case(
    contexts: tuple[int, ...],
    span: tuple[int, int],
    width: int,
    block_size: int = 16,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        lengths = tuple((1, context) for context in contexts)
        cache, tables, _, lens = build_latents(lengths, width, block_size, dtype, device)
        return cache, tables, lens, *span

    name = f"gather_latents-{'-'.join(map(str, contexts))}-w{width}-from{span[0]}"
    reference, launcher = gather_latents_reference, gather_latents_launcher
    return Case(name, gather_latents, reference, launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case((70, 3, 0, 33), (0, 106), 34, aot=BF16)
    yield _case((45,), (0, 45), 576, 8)
    yield _case((100,), (32, 80), 576)
    yield _case((100,), (64, 100), 10, 32)
    yield _case((0,), (0, 0), 16)


CASES = tuple(_cases())
