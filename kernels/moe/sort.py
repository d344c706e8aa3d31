"""Pairs of token and expert, sorted into tiles of one expert each.

Pair ``i`` of ``ids`` (int32 ``[T, k]``, experts below E) is token ``i // k`` and its ``i % k``-th
expert. An expert's pairs fill as many tiles of ``block`` places as they need, in any order (no
result depends on it). How many tiles there are is known on the device only: all arrays have room
for the most there can be, and tiles past the last have no rows.

A few thousand pairs are sorted by one program, in one launch; more by as many as there are chunks,
with a launch to count and one to place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch

_CHUNK = 1024  # pairs a program counts or places at a time
_TILES = 32  # tiles described at a time
_ALONE = 4096  # pairs that one program sorts


class Tiles(NamedTuple):
    """``order`` int32 ``[tiles * block]``: the pair at each place of each tile, undefined past a
    tile's rows; ``experts`` and ``rows`` int32 ``[tiles]``."""

    order: Tensor
    experts: Tensor
    rows: Tensor
    block: int

    @property
    def total(self) -> int:
        return self.rows.shape[0]


@triton.jit
def _count(ids_ptr, ranks_ptr, counts_ptr, first, pairs, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each pair's number among those of its expert."""
    i = first + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + i, mask=i < pairs, other=0)
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=i < pairs, sem="relaxed")
    tl.store(ranks_ptr + i, rank, mask=i < pairs)


@triton.jit
def _first_tiles(counts_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of every expert, and its first tile, int32 ``[BLOCK_E]``."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)
    tiles = (counts + BLOCK - 1) // BLOCK
    return counts, tl.cumsum(tiles, axis=0) - tiles


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    ids_ptr, ranks_ptr, order_ptr, starts, first, pairs, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Write a chunk of pairs to their places."""
    i = first + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + i, mask=i < pairs, other=0)
    place = tl.gather(starts, expert, 0) * BLOCK + tl.load(ranks_ptr + i, mask=i < pairs, other=0)
    tl.store(order_ptr + place, i, mask=i < pairs)


@triton.jit
def _describe(  # type: ignore[no-untyped-def]
    experts_ptr, rows_ptr, counts, starts, first, tiles,
    E: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Expert and rows of a few tiles."""
    t = first + tl.arange(0, TILES)
    begun = (starts[None, :] <= t[:, None]) & (counts[None, :] > 0)
    index = tl.arange(0, starts.shape[0])
    expert = tl.max(tl.where(begun, index[None, :], 0), axis=1)
    own = index[None, :] == expert[:, None]
    count = tl.sum(tl.where(own, counts[None, :], 0), axis=1)
    start = tl.sum(tl.where(own, starts[None, :], 0), axis=1)
    rows = tl.minimum(tl.maximum(count - (t - start) * BLOCK, 0), BLOCK)
    tl.store(experts_ptr + t, expert, mask=t < tiles)
    tl.store(rows_ptr + t, rows, mask=t < tiles)


@kernel(do_not_specialize=["pairs", "tiles"])
def _sort_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    ranks_ptr,
    counts_ptr,
    order_ptr,
    experts_ptr,
    rows_ptr,
    pairs,
    tiles,
    STEP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,), of which each takes every so-many-th chunk. ``counts_ptr`` int32 [E] is
    zero before "count"; STEP "all" is for one program, which sets it to zero itself."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_inputs(PDL)
    if STEP == "all":
        e = tl.arange(0, BLOCK_E)
        tl.store(counts_ptr + e, tl.zeros([BLOCK_E], tl.int32), mask=e < E)
        tl.debug_barrier()
    if STEP != "place":
        for chunk in range(program, tl.cdiv(pairs, CHUNK), programs):
            _count(ids_ptr, ranks_ptr, counts_ptr, chunk * CHUNK, pairs, CHUNK)
    if STEP == "all":
        tl.debug_barrier()
    if STEP != "count":
        counts, starts = _first_tiles(counts_ptr, E, BLOCK_E, BLOCK)
        for chunk in range(program, tl.cdiv(pairs, CHUNK), programs):
            _place(ids_ptr, ranks_ptr, order_ptr, starts, chunk * CHUNK, pairs, BLOCK, CHUNK)
        for chunk in range(program, tl.cdiv(tiles, TILES), programs):
            _describe(experts_ptr, rows_ptr, counts, starts, chunk * TILES, tiles, E, BLOCK, TILES)


def block_for(pairs: int, experts: int) -> int:
    """Places of a tile: twice what an expert gets when all get the same, 8 to 128."""
    return min(128, max(8, next_power_of_2(-(-2 * pairs // experts))))


def sort_pairs(ids: Tensor, experts: int, block: int) -> Tiles:
    """The pairs of ``ids``, of which there is at least one, in tiles of ``block`` places."""
    pairs, device = ids.numel(), ids.device
    assert ids.dtype == torch.int32 and ids.is_contiguous(), "ids"  # noqa: PT018
    tiles = min(pairs, pairs // block + min(experts, pairs))
    order = torch.empty(tiles * block, dtype=torch.int32, device=device)
    described = torch.empty((2, tiles), dtype=torch.int32, device=device)
    ranks = torch.empty(pairs, dtype=torch.int32, device=device)
    alone = pairs <= _ALONE
    counts = (torch.empty if alone else torch.zeros)(experts, dtype=torch.int32, device=device)
    launch = dependent_launch(device)
    programs = 1 if alone else -(-pairs // _CHUNK)
    chunk = max(32, next_power_of_2(min(pairs, _CHUNK)))
    for step in ("all",) if alone else ("count", "place"):
        _sort_kernel[(programs,)](
            ids, ranks, counts, order, *described, pairs, tiles, step, experts,
            next_power_of_2(experts), block, chunk, _TILES, bool(launch), num_warps=4, **launch,
        )  # fmt: skip
    return Tiles(order, described[0], described[1], block)
