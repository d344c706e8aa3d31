"""The kernel of :mod:`squall.kernels.quant.gemv`.

A chunk is what 16 bytes of the low plane hold: ``8 / low_bits`` runs of 16 weights, a run a bit
field. Per run, with x16 the integers of x and xs their scale,

    y += xs * (scale * (dot(q, x16) - offset * sum(x16)) + minimum * sum(x16))

where dot and sum are exact in int32. At the sizes of a GEMV only the weights' bytes count, as long
as the instructions stay below them. So as many programs as the GPU holds at once quantise x
(:mod:`squall.kernels.quant.gemv_input`), keep it in registers and walk over the rows of the weight,
a tile of rows in flight while the one before is worked on. A thread owns some chunks of each row of
a tile, and nothing crosses threads before the last sum. The weights do not depend on the kernel
before: with programmatic dependent launch (Hopper and newer) the first tile is being loaded while
that kernel drains and while x is quantised.

All tensors are ``[1, weight rows, chunks, words]``: with one shape, and with loads of four words
deciding the layout, values stay in the threads that load them.
"""

from squall.kernels.lang import tl, triton, wait_for_first, wait_in_order
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import finish_row, weight_rows
from squall.kernels.quant.gemv_input import add_squares, load_run, multiply, quantize
from squall.kernels.quant.mxfp4_bits import four_integers, power


@triton.jit
def _dot(q, high, low, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sum(q * (256 * high + low))`` over the bytes of four words: ``[..., 4] -> [..., 1]``."""
    if PTX:
        # Four words at a time, in one chain: the sum is the first of four results.
        sums = tl.inline_asm_elementwise(
            "{ .reg .b32 t; dp4a.s32.s32 t, $4, $8, 0; dp4a.s32.s32 t, $5, $9, t;"
            " dp4a.s32.s32 t, $6, $10, t; dp4a.s32.s32 t, $7, $11, t; shl.b32 t, t, 8;"
            " dp4a.s32.s32 t, $4, $12, t; dp4a.s32.s32 t, $5, $13, t;"
            " dp4a.s32.s32 t, $6, $14, t; dp4a.s32.s32 t, $7, $15, t;"
            " mov.b32 $0, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
            [q, high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        sums = tl.zeros(high.shape, tl.int32) + q * 0
        for byte in tl.static_range(4):
            up: tl.constexpr = 24 - 8 * byte
            x = (((high << up) >> 24) << 8) + ((low << up) >> 24)
            sums += ((q << up) >> 24) * x
    return tl.sum(sums, axis=3, keep_dims=True)


@triton.jit
def _half(bits):  # type: ignore[no-untyped-def]
    """The float16 in the low bits, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word(words, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``words[..., INDEX]`` as ``[1, R, T, 1]``; a thread has all words."""
    W: tl.constexpr = words.shape[3]
    if W > 1:
        words = tl.where(tl.arange(0, W)[None, None, None, :] == INDEX, words, 0)
        words = tl.sum(words, axis=3, keep_dims=True)
    return words


@triton.jit
def _run_scales(  # type: ignore[no-untyped-def]
    words, half, RUN: tl.constexpr, RUN_BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr
):
    """Scale and minimum of run RUN of each chunk, float32 ``[1, R, T, 1]``, without super-scales.

    ``half [1, 1, T, 1]`` is 1 in the second chunk of a unit, whose run is a group of its own where
    groups are of 16 weights.
    """
    bits = _word(words, RUN * RUN_BITS // 32).to(tl.int32)
    SHIFT: tl.constexpr = RUN * RUN_BITS % 32
    bits >>= SHIFT
    if GROUP == 16:
        bits >>= half * (RUN_BITS // 2)
    if KIND == "byte_pair":
        return (bits & 255).to(tl.float32), ((bits >> 8) & 255).to(tl.float32)
    if KIND == "half_pair":
        return _half(bits), _half(bits >> 16)
    if KIND == "half":
        scale = _half(bits)
    elif KIND == "power":
        scale = power(bits & 255)
    else:
        scale = ((bits << 24) >> 24).to(tl.float32)
    return scale, scale


@triton.jit
def _run_quants(  # type: ignore[no-untyped-def]
    low, high, RUN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """The quants of run number RUN, one a byte; ``high`` is shifted to the chunk's own fields."""
    if LOW == 8:
        return low
    FIELD: tl.constexpr = 0x0F0F0F0F if LOW == 4 else 0x03030303
    q = (low >> (LOW * RUN)) & FIELD
    if HIGH > 0:
        BITS: tl.constexpr = (0x01010101 if HIGH == 1 else 0x03030303) << LOW
        if HIGH * RUN <= LOW:
            q = q | ((high << (LOW - HIGH * RUN)) & BITS)
        else:
            q = q | ((high >> (HIGH * RUN - LOW)) & BITS)
    return q


@triton.jit
def _run(x, OFFSET: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a run of each chunk meets of x: both bytes ``[1, 1, CHUNKS, 4]``, the scale, the sum
    times the format's offset, and the sum itself in x's own units, ``[1, 1, CHUNKS, 1]``."""
    high, low, scale = quantize(x, PTX)
    total = _dot(tl.full(high.shape, 0x01010101, tl.int32), high, low, PTX)
    return high, low, scale, total * OFFSET, total.to(tl.float32) * scale


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
    PTX: tl.constexpr,
):
    """``total`` and ``least`` (the minimums' part) with one run added; ``x`` from ``_run``."""
    q = _run_quants(low, high, RUN, LOW, HIGH)
    if KIND == "power":
        q = four_integers(q, PTX)
    dot = _dot(q, x[0], x[1], PTX)
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
    x,
    factor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RUN_BITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Products of a tile with ``factor * x``: float32 ``[1, TILE]``."""
    RUNS: tl.constexpr = 8 // LOW
    half = chunk & 1
    if HIGH > 0:
        # Bring the chunk's own fields of the word that several chunks share to the bottom.
        high = high >> (((chunk // 2) % (8 // HIGH // RUNS)) * (HIGH * RUNS))
    total = tl.zeros([1, low.shape[1], low.shape[2], 1], tl.float32)
    least = total
    for run in tl.static_range(RUNS):
        total, least = _add_run(
            total, least, low, high, scales, half, x[run],
            run, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, PTX,
        )  # fmt: skip
    if KIND == "byte_pair":
        both = _word(supers, 0)
        total = total * _half(both) - least * _half(both >> 16)
    elif KIND == "byte":
        total = total * _half(_word(supers, 0).to(tl.int32))
    elif KIND == "half_pair":
        total += least
    return tl.sum(total.reshape(1, low.shape[1], low.shape[2]), axis=2) * factor


@kernel(do_not_specialize=["features", "eps"])
def plane_gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    ids_ptr,
    features,
    x_stride,
    y_stride,
    eps,
    K: tl.constexpr,
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
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    ORDER: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Grid (programs, rows of y), any number of programs. ``norm_ptr`` float32 [K] or None. BLOCKS
    are columns of the planes by 256, CHUNKS is at least the number of chunks of a row. Scales come
    in words of 32 bits, of 16 with 8-bit planes and powers; supers of 32, or of 16 where they are
    not pairs. With ``ids_ptr`` the planes have one matrix below the other, and row ``i`` of y is
    the product of row ``i // SHARE`` of x with the one that its id names; without it, SHARE is 1.
    """
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    RUNS: tl.constexpr = 8 // LOW
    BYTE: tl.constexpr = 8 if KIND == "byte" or KIND == "power" else 16
    RUN_BITS: tl.constexpr = (32 if KIND == "half_pair" else BYTE) * (32 // GROUP)
    UNIT_BITS: tl.constexpr = RUN_BITS * RUNS
    tiles = (features + OUT - 1) // OUT
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    x_ptr += (tl.program_id(1) // SHARE).to(tl.int64) * x_stride
    y_ptr += tl.program_id(1).to(tl.int64) * y_stride
    if ids_ptr is not None:  # which matrix it is has to be waited for
        wait_in_order(PDL, ORDER)
        first_row = tl.load(ids_ptr + tl.program_id(1)).to(tl.int64)
        first_row *= features * (2 if GATED else 1)
        low_ptr += first_row * (BLOCKS * 8 * LOW)
        if HIGH > 0:
            high_ptr += first_row * (BLOCKS * 8 * HIGH)
        scales_ptr += first_row * (BLOCKS * LOW * ((UNIT_BITS + 31) // 32))
        if supers_ptr is not None:
            supers_ptr += first_row * BLOCKS
        if bias_ptr is not None:
            bias_ptr += first_row
    chunk = tl.arange(0, CHUNKS)[None, None, :, None]
    low_1, high_1, scales_1, supers_1 = _load_tile(
        low_ptr, high_ptr, scales_ptr, supers_ptr, tile, tiles, features, chunk,
        BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
    )  # fmt: skip
    norm = ()
    if norm_ptr is not None:
        for run in tl.static_range(RUNS):
            norm += (load_run(norm_ptr, chunk, run, RUNS, K),)  # type: ignore[assignment]
    if ids_ptr is None:
        wait_in_order(PDL, ORDER)

    row = ()
    for run in tl.static_range(RUNS):
        row += (load_run(x_ptr, chunk, run, RUNS, K),)  # type: ignore[assignment]
    squares = tl.zeros([1, 1, CHUNKS, 4], tl.float32)
    x = ()
    for run in tl.static_range(RUNS):
        if norm_ptr is not None:
            squares = add_squares(squares, row[run])
            x += (_run(multiply(row[run], norm[run]), OFFSET, PTX),)  # type: ignore[assignment]
        else:
            x += (_run(row[run], OFFSET, PTX),)  # type: ignore[assignment]
    factor = 1.0
    if norm_ptr is not None:
        square = tl.sum(tl.sum(squares, axis=3).reshape(CHUNKS), axis=0)
        factor = tl.rsqrt(square / K + eps)
    # Two tiles in turn: a loop that hands one tile over to the next round copies its registers, and
    # a copy waits for the load.
    for _ in range(0, tl.cdiv(tl.maximum(tiles - tile, 0), 2 * step)):
        low_2, high_2, scales_2, supers_2 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, tile + step, tiles, features, chunk,
            BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(
            low_1, high_1, scales_1, supers_1, chunk, x, factor,
            LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, PTX,
        )  # fmt: skip
        finish_row(y, tile, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        low_1, high_1, scales_1, supers_1 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, tile + 2 * step, tiles, features, chunk,
            BLOCKS, LOW, HIGH, UNIT_BITS, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(
            low_2, high_2, scales_2, supers_2, chunk, x, factor,
            LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, PTX,
        )  # fmt: skip
        finish_row(y, tile + step, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        tile += 2 * step
    wait_for_first(PDL, ORDER)
