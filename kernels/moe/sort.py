"""Pairs of token and expert, sorted into tiles of one expert each.

Pair ``i`` of ``ids`` (int32 ``[T, k]``, experts below E) is token ``i // k`` and its ``i % k``-th
expert. An expert's pairs fill as many tiles of ``block`` places as they need, in any order (no
result depends on it). How many tiles there are is known on the device only: all arrays have room
for the most there can be, and tiles past the last have no rows.

Some pairs are sorted by one program, in one launch; more by as many as there are chunks, with a
launch to count and one to place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch

_ALONE = 1024  # pairs that a program sorts
_TILES = 256  # tiles declared empty at a time


class Tiles(NamedTuple):
    """``order`` int32 ``[tiles * block]``: the pair at each place of each tile, undefined past a
    tile's rows; ``places`` int32 ``[T * k]``: the place of each pair; ``experts`` and ``rows``
    int32 ``[tiles]``."""

    order: Tensor
    places: Tensor
    experts: Tensor
    rows: Tensor
    block: int

    @property
    def total(self) -> int:
        return self.rows.shape[0]


@triton.jit
def _count(expert, counts_ptr, inside):  # type: ignore[no-untyped-def]
    """Each pair's number among those of its expert."""
    return tl.atomic_add(counts_ptr + expert, 1, mask=inside, sem="relaxed")


@triton.jit
def _first_tiles(counts_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of every expert, and its first tile, int32 ``[BLOCK_E]``."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
    tiles = (counts + BLOCK - 1) // BLOCK
    return counts, tl.cumsum(tiles, axis=0) - tiles


@triton.jit
def _describe(  # type: ignore[no-untyped-def]
    experts_ptr, rows_ptr, counts, starts, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Expert and rows of every tile."""
    e = tl.arange(0, starts.shape[0])
    own = (counts + BLOCK - 1) // BLOCK
    for i in range(0, tl.max(own, axis=0)):
        rows = tl.minimum(counts - i * BLOCK, BLOCK)
        tl.store(experts_ptr + starts + i, e, mask=i < own)
        tl.store(rows_ptr + starts + i, rows, mask=i < own)
    used = tl.sum(own, axis=0)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        tl.store(rows_ptr + t, tl.zeros([TILES], tl.int32), mask=(t >= used) & (t < tiles))


@kernel(do_not_specialize=["pairs", "tiles"])
def _sort_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    places_ptr,
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
    """Grid (chunks,). ``counts_ptr`` int32 [E] is zero before STEP "count"; STEP "all" is for one
    chunk, and sets it to zero itself."""
    if STEP == "all":
        e = tl.arange(0, BLOCK_E)
        wait_for_inputs(PDL)
        tl.store(counts_ptr + e, tl.zeros([BLOCK_E], tl.int32), mask=e < E)
    else:
        wait_for_inputs(PDL)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = i < pairs
    expert = tl.load(ids_ptr + i, mask=inside, other=0)
    if STEP == "all":
        tl.debug_barrier()
    if STEP != "place":
        rank = _count(expert, counts_ptr, inside)
    if STEP == "count":
        tl.store(places_ptr + i, rank, mask=inside)  # places to be
    else:
        if STEP == "all":
            tl.debug_barrier()
        else:
            rank = tl.load(places_ptr + i, mask=inside, other=0)
        counts, starts = _first_tiles(counts_ptr, E, BLOCK_E, BLOCK)
        place = tl.gather(starts, expert, 0) * BLOCK + rank
        tl.store(order_ptr + place, i, mask=inside)
        tl.store(places_ptr + i, place, mask=inside)
        if tl.program_id(0) == 0:
            _describe(experts_ptr, rows_ptr, counts, starts, tiles, BLOCK, TILES)


def block_for(pairs: int, experts: int) -> int:
    """Places of a tile: twice what an expert gets when all get the same, 16 to 128."""
    return min(128, max(16, next_power_of_2(-(-2 * pairs // experts))))


def sort_pairs(ids: Tensor, experts: int, block: int) -> Tiles:
    """The pairs of ``ids``, of which there is at least one, in tiles of ``block`` places."""
    pairs, device = ids.numel(), ids.device
    assert ids.dtype == torch.int32 and ids.is_contiguous(), "ids"  # noqa: PT018
    tiles = min(pairs, pairs // block + min(experts, pairs))
    order = torch.empty(tiles * block, dtype=torch.int32, device=device)
    described = torch.empty((2, tiles), dtype=torch.int32, device=device)
    places = torch.empty(pairs, dtype=torch.int32, device=device)
    alone = pairs <= _ALONE
    counts = (torch.empty if alone else torch.zeros)(experts, dtype=torch.int32, device=device)
    launch = dependent_launch(device)
    chunk = max(32, next_power_of_2(min(pairs, _ALONE)))
    for step in ("all",) if alone else ("count", "place"):
        _sort_kernel[(-(-pairs // chunk),)](
            ids, places, counts, order, *described, pairs, tiles, step, experts,
            next_power_of_2(experts), block, chunk, _TILES, bool(launch), num_warps=4, **launch,
        )  # fmt: skip
    return Tiles(order, places, described[0], described[1], block)
