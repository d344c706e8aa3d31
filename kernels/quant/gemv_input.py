"""One row of activations as 16-bit integers, in the registers of a GEMV's threads.

A row of K numbers, padded with zeros, is cut into blocks of 32:

    scale = max(max|x| * (1 / 32639), 2^-100)    float32, as is 1 / scale
    x16   = round_half_even(x * (1 / scale))     in [-32639, 32639]; the product is exact
    x16   = 256 * hi + lo                        hi and lo int8, hi in [-127, 127]

32639 is 256 * 127 + 127. An element is off by little more than scale / 2, 1.5e-5 of its block's
largest, which is less than rounding to bfloat16 or float16 costs, so products are as good as with
floating-point activations.

RMS norm scales a whole row by one factor, and so does not change x16: the rows of a GEMV are summed
first and multiplied by the factor afterwards, and only the norm's weight is applied here.

Each program does this for itself, with the row from L2. A run of 16 numbers is loaded by four
threads, so that a warp's loads are contiguous, and only the finished words, a quarter of the bytes
for either half, go to the thread that multiplies with all four.
"""

from squall.kernels.lang import tl, triton


@triton.jit
def load_run(  # type: ignore[no-untyped-def]
    ptr, CHUNKS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, K: tl.constexpr
):
    """The columns of a row that run RUN of each chunk meets: float32 ``[CHUNKS, 4, 4]``. K is a
    multiple of 32."""
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    first = (chunk // 2) * (32 * RUNS) + (32 * RUN) + (chunk & 1) * 16
    column = first + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    return tl.load(ptr + column, mask=first < K, other=0.0).to(tl.float32)


@triton.jit
def _words(bits, BYTE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte BYTE of each four ``bits`` as one word: ``[..., 4] -> [...]``."""
    if PTX:
        LOW: tl.constexpr = "0x0040" if BYTE == 0 else "0x0051"
        # The word is the first of four results.
        words = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; prmt.b32 s, $4, $5, " + LOW + "; prmt.b32 t, $6, $7, " + LOW + ";"
            " prmt.b32 $0, s, t, 0x5410; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
            "=r,=r,=r,=r,r,r,r,r",
            [bits],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        place = tl.arange(0, 4)[None, None, :] * 8
        words = ((bits >> (8 * BYTE)) & 0xFF) << place
    return tl.sum(words, axis=2)


@triton.jit
def quantize(x, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of ``load_run`` as words of high and of low bytes, int32 ``[CHUNKS, 4]``, and the scales,
    float32 ``[CHUNKS]``."""
    CHUNKS: tl.constexpr = x.shape[0]
    largest = tl.max(tl.max(tl.abs(x), axis=2), axis=1).reshape(CHUNKS // 2, 2)
    largest = tl.max(largest, axis=1, keep_dims=True).broadcast_to(CHUNKS // 2, 2).reshape(CHUNKS)
    # At least 2^-100, so that 1 / scale is finite.
    scale = tl.maximum(largest * (1.0 / 32639.0), 7.888609052210118e-31)
    inverse = 1.0 / scale  # not IEEE's on a GPU: off by two units in the last place at most
    # One fused operation: adding 1.5 * 2^23 to the exact product rounds it half to even and leaves
    # the integer in the low bits. With 128 more, byte 1 is hi, and byte 0 lo with its sign flipped.
    bias = tl.full(x.shape, 12583040.0, tl.float32)
    bits = tl.fma(x, inverse[:, None, None].broadcast_to(x.shape), bias).to(tl.int32, bitcast=True)
    return _words(bits, 1, PTX), _words(bits, 0, PTX) ^ -2139062144, scale
