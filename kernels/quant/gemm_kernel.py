"""The kernel of :mod:`squall.kernels.quant.gemm`.

A program computes the tile ``[BLOCK_N weight rows, BLOCK_M rows of x]`` of the transposed result.
The packed planes go through shared memory, several stages ahead of the arithmetic, from there
straight into the registers where the tensor core wants its first operand, and become numbers there
(:mod:`squall.kernels.quant.gemm_dequant`); x is the second operand, read from shared memory. A
weight is so dequantised once for up to BLOCK_M rows of x. x is at most a few MB, which L2 keeps
whatever the order of programs.

All loads of the loop are of 32 bits a thread and more, or Triton would not put them through shared
memory ahead of time; and nothing in it moves values between threads, or Triton would load the
planes in another layout and pass the finished weights through shared memory instead.
"""

from squall.kernels.lang import tl, triton, wait_for_inputs
from squall.kernels.linear_epilogue import finish_tile, weight_rows
from squall.kernels.quant.gemm_dequant import (
    run_scales,
    run_weights,
    spread_words,
    super_scales,
    two_runs,
)


@triton.jit(do_not_specialize=["rows", "features", "units"])
def plane_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    features,
    K,
    units,
    x_stride,
    y_stride,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    GAIN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of weight rows x tiles of rows of x, SPLIT); each of SPLIT programs has a part
    of K. ``features`` are columns of y. ``units`` are columns of the planes by 256: the compiler
    then knows how their rows are aligned. EVEN: BLOCK_K divides K. Words of the quants are int16,
    all others int32.

    ``partial_ptr`` float32 [grid 0, SPLIT, BLOCK_N, BLOCK_M], ``counter_ptr`` int32 [grid 0].
    """
    wait_for_inputs(PDL)
    PAIRS: tl.constexpr = BLOCK_K // 64
    WORDS: tl.constexpr = 2 if KIND == "half_pair" or (KIND == "byte_pair" and GROUP == 16) else 1
    # Pairs of runs that share words of the high plane.
    SHARE: tl.constexpr = 4 // HIGH_BITS if HIGH_BITS > 0 else 1
    job, part = tl.program_id(0), tl.program_id(1)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    tile = job // m_tiles
    w_row = weight_rows(tile, features, BLOCK_N, ACTIVATION != "none")
    row = (job % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 64)
    word = tl.arange(0, 16)[None, :]
    x_tile = x_ptr + row[None, :] * x_stride + column[:, None]
    x_mask = (row < rows)[None, :]
    low_tile = low_ptr + (w_row * (units * (16 * LOW_BITS)))[:, None] + word
    if HIGH_BITS > 0:
        high_tile = high_ptr + (w_row * (units * (16 * HIGH_BITS)))[:, None] + word
    scales_row = scales_ptr + w_row * (units * (4 * WORDS))
    if supers_ptr is not None:
        supers_row = w_row * units
        parity = (supers_row & 1).to(tl.int32)

    z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    for i in range(blocks * part // SPLIT, blocks * (part + 1) // SPLIT):
        if KIND == "byte_pair":
            supers = tl.load(supers_ptr + supers_row + i * BLOCK_K // 256)
        elif KIND == "byte":
            # One float16. Only loads of 32 bits and more go through shared memory ahead of time,
            # so take two and choose.
            s = i * BLOCK_K // 256
            supers = tl.load(supers_ptr + ((supers_row + s) >> 1)) >> ((s + parity) & 1) * 16
        else:
            supers = 0
        supers = super_scales(supers, GAIN, KIND, PTX)
        for p in tl.static_range(PAIRS):
            pair = i * PAIRS + p
            k = pair * 64
            if EVEN:
                x = tl.load(x_tile + k, mask=x_mask, other=0.0)
            else:
                inside = (column < K - k)[:, None]
                x = tl.load(x_tile + k, mask=x_mask & inside, other=0.0)
            # Words of the two runs: their own, the same, or those of the pair before as well.
            if LOW_BITS == 8:
                low0 = spread_words(tl.load(low_tile + pair * 32), PTX)
                low1 = spread_words(tl.load(low_tile + pair * 32 + 16), PTX)
            elif LOW_BITS == 4:
                low0 = spread_words(tl.load(low_tile + pair * 16), PTX)
                low1 = low0
            elif p % 2 == 0:
                low0 = spread_words(tl.load(low_tile + pair * 8), PTX)
                low1 = low0
            if HIGH_BITS == 0:
                high = low0
            elif PAIRS >= SHARE:
                if p % SHARE == 0:
                    high = spread_words(tl.load(high_tile + pair * 4 * HIGH_BITS), PTX)
            elif p == 0:
                # A block is a part of the high plane's words: move its bits to the bottom.
                bits = tl.load(high_tile + pair // SHARE * 16).to(tl.int32) & 0xFFFF
                high = spread_words(bits >> (pair % SHARE * 2 * HIGH_BITS), PTX)
            first = tl.load(scales_row + pair * WORDS)
            words = (first, tl.load(scales_row + pair * WORDS + 1) if WORDS == 2 else first)
            scale, minimum = run_scales(words, supers, 0, GROUP, KIND, PTX)
            even = run_weights(
                low0,
                high,
                scale,
                minimum,
                2 * p * LOW_BITS % 8,
                2 * p * HIGH_BITS % 8,
                LOW_BITS,
                HIGH_BITS,
                OFFSET,
                PAIRED,
                PTX,
            )
            scale, minimum = run_scales(words, supers, 1, GROUP, KIND, PTX)
            odd = run_weights(
                low1,
                high,
                scale,
                minimum,
                (2 * p + 1) * LOW_BITS % 8,
                (2 * p + 1) * HIGH_BITS % 8,
                LOW_BITS,
                HIGH_BITS,
                OFFSET,
                PAIRED,
                PTX,
            )
            z = tl.dot(two_runs(even, odd, x.dtype), x, z)
        if PTX:
            # Nothing, but the sums are used: a product that is still under way at the end of an
            # iteration makes the assembler wait after every single instruction of the next one.
            z = tl.inline_asm_elementwise("", "=f,0", [z], tl.float32, is_pure=True, pack=1)

    if SPLIT == 1:
        z *= 1.0 / GAIN
        finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
    else:
        n = tl.arange(0, BLOCK_N)[:, None]
        m = tl.arange(0, BLOCK_M)[None, :]
        parts = partial_ptr + job.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M) + n * BLOCK_M + m
        tl.store(parts + part * (BLOCK_N * BLOCK_M), z)
        tl.debug_barrier()  # all threads' sums are written before one thread says so
        arrived = tl.atomic_add(counter_ptr + job, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            z = tl.load(parts, cache_modifier=".cg")
            for s in tl.static_range(1, SPLIT):
                z += tl.load(parts + s * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            z *= 1.0 / GAIN
            finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
            tl.store(counter_ptr + job, 0)
