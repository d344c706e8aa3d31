"""The kernel of :mod:`squall.kernels.quant.gemv`.

A chunk is what 16 bytes of the low plane hold: ``8 / low_bits`` runs of 16 weights, a run a bit
field. Per run, with x16 the integers of x and xs their scale,

    y += xs * (scale * (dot(q, x16) - offset * sum(x16)) + minimum * sum(x16))

where dot and sum are exact in int32. At the sizes of a GEMV only the weights' bytes count, as long
as the instructions stay below them. So: a thread owns one chunk of each row of its program's tile,
and nothing crosses threads before the last sum; x is loaded once for all rows of a tile; scales
come as whole words; and all that a tile needs of the weights is in flight while the tile before is
worked on. The weights do not depend on the kernel before: with programmatic dependent launch
(Hopper and newer) the first tile is being loaded while that kernel drains.

All tensors are ``[rows of x, weight rows, threads, words]``: with one shape, and with loads of four
words deciding the layout, values stay in the threads that load them.
"""

from squall.kernels.lang import tl, triton, wait_for_inputs
from squall.kernels.linear_epilogue import gate, store, weight_rows


@triton.jit
def _dot(q, high, low, DP4A: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sum(q * (256 * high + low))`` over the bytes of four words: ``[..., 4] -> [..., 1]``."""
    if DP4A:
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
def _load(ptr, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A part of a tile of weights; all of it exists where EVEN."""
    if EVEN:
        part = tl.load(ptr, eviction_policy="evict_first")
    else:
        part = tl.load(ptr, mask=inside, other=0, eviction_policy="evict_first")
    return part


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    row,
    start,
    BLOCKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Chunks ``start`` to ``start + THREADS`` of rows ``[1, R, 1, 1]``: ``[1, R, THREADS, words]``.

    Two chunks are a unit, 32 weights of each run; its scales have UNIT_BITS bits. Without a high
    plane or super-scales the low words stand in for them, unused.
    """
    RUNS: tl.constexpr = 8 // LOW
    chunk = start + tl.arange(0, THREADS)[None, None, :, None]
    inside = chunk < BLOCKS * (2 * LOW)
    unit = chunk // 2
    word = tl.arange(0, 4)[None, None, None, :]
    low = _load(low_ptr + row * (BLOCKS * 8 * LOW) + (chunk * 4 + word), inside, EVEN)
    high = low
    if HIGH > 0:
        SHARED: tl.constexpr = 8 // HIGH // RUNS
        place = (unit // SHARED) * 8 + (chunk % 2) * 4 + word
        high = _load(high_ptr + row * (BLOCKS * 8 * HIGH) + place, inside, EVEN)
    WORDS: tl.constexpr = (UNIT_BITS + 31) // 32
    place = unit * WORDS + tl.arange(0, WORDS)[None, None, None, :]
    scales = _load(scales_ptr + row * (BLOCKS * LOW * WORDS) + place, inside, EVEN)
    supers = low
    if supers_ptr is not None:
        supers = _load(supers_ptr + row * BLOCKS + unit // LOW, inside, EVEN)
    return low, high, scales, supers


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
    scale = _half(bits) if KIND == "half" else ((bits << 24) >> 24).to(tl.float32)
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
def _work(  # type: ignore[no-untyped-def]
    low,
    high,
    scales,
    supers,
    parts_ptr,
    scale_ptr,
    sums_ptr,
    x_row,
    rows,
    start,
    BLOCKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RUN_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    DP4A: tl.constexpr,
):
    """Products of a tile with rows ``[M, 1, 1, 1]`` of x, float32 ``[M, R, THREADS, 1]``."""
    RUNS: tl.constexpr = 8 // LOW
    PAIRED: tl.constexpr = KIND == "byte_pair" or KIND == "half_pair"
    chunk = start + tl.arange(0, low.shape[2])[None, None, :, None]
    inside = (x_row >= 0) if EVEN else (x_row >= 0) & (chunk < BLOCKS * (2 * LOW))
    unit = chunk // 2
    # With % 2 the compiler would see two neighbouring sums, load them as one vector and move them
    # to other threads.
    half = chunk & 1
    if HIGH > 0:
        # Bring the chunk's own fields of the word that several chunks share to the bottom.
        high = high >> ((unit % (8 // HIGH // RUNS)) * (HIGH * RUNS))
    total = tl.zeros([x_row.shape[0], low.shape[1], low.shape[2], 1], tl.float32)
    least = total
    for run in tl.static_range(RUNS):
        place = unit * (8 * RUNS) + 8 * run + half * 4
        place = place + tl.arange(0, 4)[None, None, None, :] + x_row * (BLOCKS * 64)
        x_high = tl.load(parts_ptr + place, mask=inside, other=0)
        x_low = tl.load(parts_ptr + rows * (BLOCKS * 64) + place, mask=inside, other=0)
        place = x_row * (BLOCKS * 8) + (unit * RUNS + run)
        xs = tl.load(scale_ptr + place, mask=inside, other=0.0)
        dot = _dot(_run_quants(low, high, run, LOW, HIGH), x_high, x_low, DP4A)
        if OFFSET > 0 or PAIRED:
            place = x_row * (BLOCKS * 16) + (unit * (2 * RUNS) + 2 * run + half)
            sums = tl.load(sums_ptr + place, mask=inside, other=0)
        if OFFSET > 0:
            dot -= OFFSET * sums
        scale, minimum = _run_scales(scales, half, run, RUN_BITS, GROUP, KIND)
        total += (dot.to(tl.float32) * xs) * scale
        if PAIRED:
            least += (sums.to(tl.float32) * xs) * minimum
    if KIND == "byte_pair":
        both = _word(supers, 0)
        total = total * _half(both) - least * _half(both >> 16)
    elif KIND == "byte":
        total = total * _half(_word(supers, 0).to(tl.int32))
    elif KIND == "half_pair":
        total += least
    return total


@triton.jit(do_not_specialize=["rows", "features"])
def plane_gemv_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    scale_ptr,
    sums_ptr,
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    rows,
    features,
    y_stride,
    BLOCKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of TILE weight rows,). ``features`` are columns of y, BLOCKS is KP / 256; parts,
    low, high, scales and supers are words of 32 bits (scales of Q8_0 and single supers: 16).
    ROWS >= rows; THREADS are all of the program's."""
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    BYTE: tl.constexpr = 8 if KIND == "byte" else 16
    RUN_BITS: tl.constexpr = (32 if KIND == "half_pair" else BYTE) * (32 // GROUP)
    UNIT_BITS: tl.constexpr = RUN_BITS * (8 // LOW)
    EVEN: tl.constexpr = BLOCKS * 2 * LOW % THREADS == 0
    STEPS: tl.constexpr = (BLOCKS * 2 * LOW + THREADS - 1) // THREADS
    tile = tl.program_id(0)
    w_row = weight_rows(tile, features, TILE, GATED)
    row = w_row[None, :, None, None]

    low, high, scales, supers = _load_tile(
        low_ptr, high_ptr, scales_ptr, supers_ptr, row, 0,
        BLOCKS, LOW, HIGH, UNIT_BITS, THREADS, EVEN,
    )  # fmt: skip
    wait_for_inputs(PDL)

    x_row = tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None, None, None]
    acc = tl.zeros([ROWS, TILE, THREADS, 1], tl.float32)
    # Two tiles in turn: a loop that hands one tile over to the next round copies its registers, and
    # a copy waits for the load.
    ROUNDS: tl.constexpr = (STEPS - 1) // 2
    for i in range(ROUNDS):
        start = i * (2 * THREADS)
        low_2, high_2, scales_2, supers_2 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, row, start + THREADS,
            BLOCKS, LOW, HIGH, UNIT_BITS, THREADS, EVEN,
        )  # fmt: skip
        acc += _work(
            low, high, scales, supers, parts_ptr, scale_ptr, sums_ptr, x_row, rows, start,
            BLOCKS, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, EVEN, DP4A,
        )  # fmt: skip
        low, high, scales, supers = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, row, start + 2 * THREADS,
            BLOCKS, LOW, HIGH, UNIT_BITS, THREADS, EVEN,
        )  # fmt: skip
        acc += _work(
            low_2, high_2, scales_2, supers_2, parts_ptr, scale_ptr, sums_ptr, x_row, rows,
            start + THREADS,
            BLOCKS, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, EVEN, DP4A,
        )  # fmt: skip
    LAST: tl.constexpr = (STEPS - 1) * THREADS
    if STEPS % 2 == 0:
        low_3, high_3, scales_3, supers_3 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, row, LAST,
            BLOCKS, LOW, HIGH, UNIT_BITS, THREADS, EVEN,
        )  # fmt: skip
    acc += _work(
        low, high, scales, supers, parts_ptr, scale_ptr, sums_ptr, x_row, rows,
        ROUNDS * 2 * THREADS,
        BLOCKS, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, EVEN, DP4A,
    )  # fmt: skip
    if STEPS % 2 == 0:
        acc += _work(
            low_3, high_3, scales_3, supers_3, parts_ptr, scale_ptr, sums_ptr, x_row, rows, LAST,
            BLOCKS, LOW, HIGH, OFFSET, GROUP, KIND, RUN_BITS, EVEN, DP4A,
        )  # fmt: skip

    y = tl.sum(acc.reshape(ROWS, TILE, THREADS), axis=2)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    if GATED:
        z, up = tl.split(y.reshape(ROWS, 2, OUT).permute(0, 2, 1))
        y = gate(z, up, ACTIVATION)
    out_row = tl.arange(0, ROWS)[:, None]
    feature = tile * OUT + tl.arange(0, OUT)[None, :]
    target = y_ptr + out_row.to(tl.int64) * y_stride + feature
    store(target, y, (out_row < rows) & (feature < features), ADD)
