"""The kernel of :mod:`squall.kernels.quant.gemm`.

A program computes the tile ``[BLOCK_N weight rows, BLOCK_M rows of x]`` of the transposed result.
The packed planes go through shared memory, several stages ahead of the arithmetic, from there
straight into the registers where the tensor core wants its first operand, and become numbers there
(:mod:`squall.kernels.quant.gemm_dequant`); x is the second operand, read from shared memory. A
weight is so dequantised once for up to BLOCK_M rows of x. x is at most a few MB, which L2 keeps
whatever the order of programs.

Planes and x come by tensor descriptors (TMA on Hopper): besides sparing the threads the copying,
that swizzles shared memory. Eight rows of words, from which a warp reads two bytes each, would
otherwise be in the same banks: measured, half of the kernel's time. Scales are too narrow for it.
Nothing in the loop moves values between threads, or Triton would load the planes in another layout
and pass the finished weights through shared memory instead.
"""

from squall.kernels.lang import tl, triton, wait_for_first, wait_in_order
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import (
    finish_tile,
    is_last_part,
    sum_of_parts,
    weight_rows,
)
from squall.kernels.quant.gemm_dequant import dequantize_tile, super_scales


@triton.jit
def load_weights(  # type: ignore[no-untyped-def]
    low_tiles,
    high_tiles,
    scales_tile,
    supers_ptr,
    supers_row,
    matrix,
    first_feature,
    i,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Block number ``i`` of a tile's columns, times GAIN: ``[BLOCK_N, BLOCK_K]`` of DTYPE. The tile
    begins with row ``first_feature`` of ``matrix``, an index of the planes' first axis."""
    LOW_WORDS: tl.constexpr = BLOCK_K * LOW_BITS // 16
    HIGH_WORDS: tl.constexpr = BLOCK_K * HIGH_BITS // 16
    if KIND == "byte_pair":
        supers = tl.load(supers_ptr + supers_row + i * BLOCK_K // 256)[:, None]
    elif KIND == "byte":
        # One float16. Only loads of 32 bits and more go through shared memory ahead of time,
        # so take two and choose.
        s = i * BLOCK_K // 256
        parity = (supers_row & 1).to(tl.int32)
        supers = tl.load(supers_ptr + ((supers_row + s) >> 1)) >> ((s + parity) & 1) * 16
        supers = supers[:, None]
    else:
        supers = 0
    low = low_tiles.load([matrix, first_feature, i * LOW_WORDS]).reshape(BLOCK_N, LOW_WORDS)
    high = low
    if HIGH_BITS > 0:
        high = high_tiles.load([matrix, first_feature, i * HIGH_WORDS])
        high = high.reshape(BLOCK_N, HIGH_WORDS)
    scales = tl.load(scales_tile + i * scales_tile.shape[1])
    return dequantize_tile(
        low,
        high,
        scales,
        super_scales(supers, GAIN, KIND, PTX),
        LOW_BITS,
        HIGH_BITS,
        OFFSET,
        GROUP,
        KIND,
        PAIRED,
        DTYPE,
        PTX,
    )


@triton.jit
def use(z, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``z``, which is a product still under way: it makes the assembler wait after every single
    instruction of the next round, unless something uses it in this one."""
    if PTX:
        z = tl.inline_asm_elementwise("", "=f,0", [z], tl.float32, is_pure=True, pack=1)
    return z


@kernel(do_not_specialize=["rows", "features", "units"])
def plane_gemm_kernel(  # type: ignore[no-untyped-def]
    x_tiles,
    low_tiles,
    high_tiles,
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
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Grid (tiles of weight rows x tiles of rows of x, SPLIT); each of SPLIT programs has a part
    of K. ``features`` are columns of y. ``units`` are columns of the planes by 256: the compiler
    then knows how their rows are aligned.

    ``x_tiles`` describes x by ``[BLOCK_M, BLOCK_K]``; ``low_tiles`` and ``high_tiles`` int16 words
    ``[1, N, words]`` of the planes by ``[1, BLOCK_N, words of BLOCK_K]``, or, with an activation,
    ``[2, N / 2, words]`` by ``[2, BLOCK_N / 2, words of BLOCK_K]``. All others are int32 words.
    ``partial_ptr`` float32 [grid 0, SPLIT, BLOCK_N, BLOCK_M], ``counter_ptr`` int32 [grid 0].
    """
    wait_in_order(PDL, ORDER)
    WORDS: tl.constexpr = 2 if KIND == "half_pair" or (KIND == "byte_pair" and GROUP == 16) else 1
    SCALES: tl.constexpr = BLOCK_K // 128 if KIND == "power" else BLOCK_K // 64 * WORDS
    ROW_SCALES: tl.constexpr = SCALES * 256 // BLOCK_K  # words for 256 columns
    job, part = tl.program_id(0), tl.program_id(1)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    tile, first_row = job // m_tiles, job % m_tiles * BLOCK_M
    first_feature = tile * (BLOCK_N // 2 if ACTIVATION != "none" else BLOCK_N)
    w_row = weight_rows(tile, features, BLOCK_N, ACTIVATION != "none")
    scale_word = tl.arange(0, SCALES)[None, :]
    scales_tile = scales_ptr + (w_row * (units * ROW_SCALES))[:, None] + scale_word
    supers_row = w_row * units

    z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    for i in range(blocks * part // SPLIT, blocks * (part + 1) // SPLIT):
        x = x_tiles.load([first_row, i * BLOCK_K])
        w = load_weights(
            low_tiles, high_tiles, scales_tile, supers_ptr, supers_row, 0, first_feature, i,
            LOW_BITS, HIGH_BITS, OFFSET, GROUP, KIND, PAIRED, GAIN, BLOCK_N, BLOCK_K, x.dtype, PTX,
        )  # fmt: skip
        z = use(tl.dot(w, x.T, z), PTX)

    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    if SPLIT == 1:
        z *= 1.0 / GAIN
        finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
    else:
        parts_ptr = partial_ptr + job.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
        if is_last_part(z, parts_ptr, counter_ptr + job, part, SPLIT):
            z = sum_of_parts(parts_ptr, counter_ptr + job, BLOCK_N, BLOCK_M, SPLIT)
            z *= 1.0 / GAIN
            finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
    wait_for_first(PDL, ORDER)
