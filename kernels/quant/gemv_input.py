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

A thread has the 16 numbers that a run of its chunk meets, as four loads of four: a block's other
half is in the next thread, and the block's maximum is all that the two exchange.
"""

from squall.kernels.lang import tl, triton


@triton.jit
def load_run(  # type: ignore[no-untyped-def]
    ptr, chunk, RUN: tl.constexpr, RUNS: tl.constexpr, K: tl.constexpr
):
    """The columns of a row that run RUN of each chunk meets: four times float32 ``[1, 1, CHUNKS,
    4]``. K is a multiple of 32."""
    first = (chunk // 2) * (32 * RUNS) + (32 * RUN) + (chunk & 1) * 16
    ptr += first + tl.arange(0, 4)[None, None, None, :]
    inside = first < K
    return (
        tl.load(ptr, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 4, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 8, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 12, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def multiply(x, y):  # type: ignore[no-untyped-def]
    """Two of ``load_run``, number by number."""
    return x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]


@triton.jit
def add_squares(total, x):  # type: ignore[no-untyped-def]
    """``total``, float32 ``[1, 1, CHUNKS, 4]``, with the squares of one of ``load_run``."""
    return total + x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]


@triton.jit
def _rounded(x, inverse):  # type: ignore[no-untyped-def]
    """``x * inverse`` rounded to an integer, as the bits of that integer + 128 + 1.5 * 2^23: byte 1
    is hi, byte 0 is lo with its sign flipped.

    One fused operation: adding 1.5 * 2^23 to the exact product rounds it half to even and leaves
    the integer in the low bits.
    """
    bias = tl.full(x.shape, 12583040.0, tl.float32)
    return tl.fma(x, inverse.broadcast_to(x.shape), bias).to(tl.int32, bitcast=True)


@triton.jit
def _pack(a, b, c, d, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of the four high bytes and words of the four low bytes, int32 ``[1, 1, CHUNKS, 4]``:
    word i from the bits of the i-th argument."""
    if PTX:
        # Byte 1 and byte 0 of the four numbers of an argument; sixteen registers in, eight out.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, t;"
            " prmt.b32 s, $8, $9, 0x5140; prmt.b32 t, $10, $11, 0x5140;"
            " prmt.b32 $0, s, t, 0x7632; prmt.b32 $4, s, t, 0x5410;"
            " prmt.b32 s, $12, $13, 0x5140; prmt.b32 t, $14, $15, 0x5140;"
            " prmt.b32 $1, s, t, 0x7632; prmt.b32 $5, s, t, 0x5410;"
            " prmt.b32 s, $16, $17, 0x5140; prmt.b32 t, $18, $19, 0x5140;"
            " prmt.b32 $2, s, t, 0x7632; prmt.b32 $6, s, t, 0x5410;"
            " prmt.b32 s, $20, $21, 0x5140; prmt.b32 t, $22, $23, 0x5140;"
            " prmt.b32 $3, s, t, 0x7632; prmt.b32 $7, s, t, 0x5410;"
            " xor.b32 $4, $4, 0x80808080; xor.b32 $5, $5, 0x80808080;"
            " xor.b32 $6, $6, 0x80808080; xor.b32 $7, $7, 0x80808080; }",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
    place = tl.arange(0, 4)[None, None, None, :]
    high, low = tl.zeros_like(a), tl.zeros_like(a)
    parts = a, b, c, d
    for i in tl.static_range(4):
        byte = ((parts[i] >> 8) & 0xFF) << (place * 8)
        high += tl.where(place == i, tl.sum(byte, axis=3, keep_dims=True), 0)
        byte = ((parts[i] & 0xFF) ^ 0x80) << (place * 8)
        low += tl.where(place == i, tl.sum(byte, axis=3, keep_dims=True), 0)
    return high, low


@triton.jit
def quantize(x, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of ``load_run`` as words of high and of low bytes, int32 ``[1, 1, CHUNKS, 4]``, and the
    scales, float32 ``[1, 1, CHUNKS, 1]``."""
    CHUNKS: tl.constexpr = x[0].shape[2]
    largest = tl.maximum(
        tl.maximum(tl.abs(x[0]), tl.abs(x[1])), tl.maximum(tl.abs(x[2]), tl.abs(x[3]))
    )
    largest = tl.max(largest, axis=3).reshape(1, 1, CHUNKS // 2, 2)
    largest = tl.max(largest, axis=3, keep_dims=True).broadcast_to(1, 1, CHUNKS // 2, 2)
    largest = largest.reshape(1, 1, CHUNKS, 1)
    # At least 2^-100, so that 1 / scale is finite.
    scale = tl.maximum(largest * (1.0 / 32639.0), 7.888609052210118e-31)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    high, low = _pack(
        _rounded(x[0], inverse),
        _rounded(x[1], inverse),
        _rounded(x[2], inverse),
        _rounded(x[3], inverse),
        PTX,
    )
    return high, low, scale
