"""The kernel of :mod:`squall.kernels.quant.gemv` for one row of x.

The arithmetic, and what a chunk, a run and a unit are, is that of
:mod:`squall.kernels.quant.gemv_kernel`. With one row there is twice as much of x as of two rows of
4-bit weights, so x must not be read for every tile: as many programs as the GPU holds at once keep
all of x in registers and walk over the rows of the weight, a tile of rows in flight while the one
before is worked on.
"""

from squall.kernels.lang import tl, triton
from squall.kernels.linear_epilogue import finish_row, weight_rows
from squall.kernels.quant.gemv_kernel import _dot, _half, _run_quants, _run_scales, _word


@triton.jit
def _load_run(  # type: ignore[no-untyped-def]
    parts_ptr,
    scale_ptr,
    sums_ptr,
    chunk,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """What run RUN of each chunk meets of x: both parts ``[1, 1, CHUNKS, 4]``, the scale, the sum
    times the format's offset, and the sum itself in x's own units, ``[1, 1, CHUNKS, 1]``."""
    inside = chunk < BLOCKS * (16 // RUNS)
    unit, half = chunk // 2, chunk & 1
    place = unit * (8 * RUNS) + 8 * RUN + half * 4 + tl.arange(0, 4)[None, None, None, :]
    high = tl.load(parts_ptr + place, mask=inside, other=0)
    low = tl.load(parts_ptr + BLOCKS * 64 + place, mask=inside, other=0)
    xs = tl.load(scale_ptr + unit * RUNS + RUN, mask=inside, other=0.0)
    total = tl.load(sums_ptr + unit * (2 * RUNS) + 2 * RUN + half, mask=inside, other=0)
    return high, low, xs, total * OFFSET, total.to(tl.float32) * xs


@triton.jit
def _load(ptr, inside):  # type: ignore[no-untyped-def]
    return tl.load(ptr, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    tile,
    tiles,
    features,
    chunk,
    BLOCKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    TILE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Tile number ``tile``, ``[1, TILE, CHUNKS, words]`` each; nothing is loaded past the last one.
    Without a high plane or super-scales the low words stand in for them, unused."""
    RUNS: tl.constexpr = 8 // LOW
    row = weight_rows(tile, features, TILE, GATED)[None, :, None, None]
    inside = (chunk < BLOCKS * (2 * LOW)) & (tile < tiles)
    unit = chunk // 2
    word = tl.arange(0, 4)[None, None, None, :]
    low = _load(low_ptr + row * (BLOCKS * 8 * LOW) + (chunk * 4 + word), inside)
    high = low
    if HIGH > 0:
        SHARED: tl.constexpr = 8 // HIGH // RUNS
        place = (unit // SHARED) * 8 + (chunk % 2) * 4 + word
        high = _load(high_ptr + row * (BLOCKS * 8 * HIGH) + place, inside)
    WORDS: tl.constexpr = (UNIT_BITS + 31) // 32
    place = unit * WORDS + tl.arange(0, WORDS)[None, None, None, :]
    scales = _load(scales_ptr + row * (BLOCKS * LOW * WORDS) + place, inside)
    supers = low
    if supers_ptr is not None:
        supers = _load(supers_ptr + row * BLOCKS + unit // LOW, inside)
    return low, high, scales, supers


@triton.jit
def _add_run(  # type: ignore[no-untyped-def]
    total,
    least,
    low,
    high,
    scales,
    half,
    x,
    RUN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RUN_BITS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """``total`` and ``least`` (the minimums' part) with one run added; ``x`` from ``_load_run``."""
    dot = _dot(_run_quants(low, high, RUN, LOW, HIGH), x[0], x[1], DP4A)
    if OFFSET > 0:
        dot -= x[3]
    scale, minimum = _run_scales(scales, half, RUN, RUN_BITS, GROUP, KIND)
    total += (dot.to(tl.float32) * x[2]) * scale
    if KIND == "byte_pair" or KIND == "half_pair":
        least += x[4] * minimum
    return total, least


@triton.jit
def _tile_sums(  # type: ignore[no-untyped-def]
    low,
    high,
    scales,
    supers,
    chunk,
    x0,
    x1,
    x2,
    x3,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RUN_BITS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """Products of a tile with x: float32 ``[1, TILE]``."""
    RUNS: tl.constexpr = 8 // LOW
    half = chunk & 1
    if HIGH > 0:
        # Bring the chunk's own fields of the word that several chunks share to the bottom.
        high = high >> (((chunk // 2) % (8 // HIGH // RUNS)) * (HIGH * RUNS))
    total = tl.zeros([1, low.shape[1], low.shape[2], 1], tl.float32)
    least = total
    total, least = _add_run(
        total, least, low, high, scales, half, x0, 0, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A
    )
    if RUNS > 1:
        total, least = _add_run(
            total, least, low, high, scales, half, x1,
            1, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A,
        )  # fmt: skip
    if RUNS > 2:
        total, least = _add_run(
            total, least, low, high, scales, half, x2,
            2, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A,
        )  # fmt: skip
        total, least = _add_run(
            total, least, low, high, scales, half, x3,
            3, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A,
        )  # fmt: skip
    if KIND == "byte_pair":
        both = _word(supers, 0)
        total = total * _half(both) - least * _half(both >> 16)
    elif KIND == "byte":
        total = total * _half(_word(supers, 0).to(tl.int32))
    elif KIND == "half_pair":
        total += least
    return tl.sum(total.reshape(1, low.shape[1], low.shape[2]), axis=2)


@triton.jit(do_not_specialize=["features"])
def resident_gemv_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    scale_ptr,
    sums_ptr,
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    features,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,), any number. Arguments as ``plane_gemv_kernel``'s; CHUNKS is at least the
    number of chunks of a row."""
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    RUNS: tl.constexpr = 8 // LOW
    BYTE: tl.constexpr = 8 if KIND == "byte" else 16
    RUN_BITS: tl.constexpr = (32 if KIND == "half_pair" else BYTE) * (32 // GROUP)
    UNIT_BITS: tl.constexpr = RUN_BITS * RUNS
    tiles = (features + OUT - 1) // OUT
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)[None, None, :, None]
    low_1, high_1, scales_1, supers_1 = _load_tile(
        low_ptr, high_ptr, scales_ptr, supers_ptr, tile, tiles, features, chunk,
        BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    x0 = _load_run(parts_ptr, scale_ptr, sums_ptr, chunk, 0, RUNS, BLOCKS, OFFSET)
    x1, x2, x3 = x0, x0, x0
    if RUNS > 1:
        x1 = _load_run(parts_ptr, scale_ptr, sums_ptr, chunk, 1, RUNS, BLOCKS, OFFSET)
    if RUNS > 2:
        x2 = _load_run(parts_ptr, scale_ptr, sums_ptr, chunk, 2, RUNS, BLOCKS, OFFSET)
        x3 = _load_run(parts_ptr, scale_ptr, sums_ptr, chunk, 3, RUNS, BLOCKS, OFFSET)
    # Two tiles in turn: a loop that hands one tile over to the next round copies its registers, and
    # a copy waits for the load.
    for _ in range(0, tl.cdiv(tl.maximum(tiles - tile, 0), 2 * step)):
        low_2, high_2, scales_2, supers_2 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, tile + step, tiles, features, chunk,
            BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(
            low_1, high_1, scales_1, supers_1, chunk, x0, x1, x2, x3,
            LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A,
        )  # fmt: skip
        finish_row(y, tile, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        low_1, high_1, scales_1, supers_1 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, tile + 2 * step, tiles, features, chunk,
            BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(
            low_2, high_2, scales_2, supers_2, chunk, x0, x1, x2, x3,
            LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, DP4A,
        )  # fmt: skip
        finish_row(y, tile + step, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        tile += 2 * step
