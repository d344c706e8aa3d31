"""One row of activations as 16-bit integers, in the registers of a GEMV's threads.

A row of K numbers, padded with zeros, is cut into blocks of 32:

    scale = max|x| / 32639            float32
    x16   = round_half_even(x / scale)    in [-32639, 32639]; 0 in blocks of zeros
    x16   = 256 * hi + lo             hi and lo int8, hi in [-127, 127]

32639 is 256 * 127 + 127. An element is off by at most scale / 2, 1.5e-5 of its block's largest,
which is less than rounding to bfloat16 or float16 costs, so products are as good as with floating-
point activations.

RMS norm scales a whole row by one factor, and so does not change x16: only the scales wait for the
sum of squares.
"""

from squall.kernels.lang import tl, triton


@triton.jit
def _pack(x, inverse, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round ``x * inverse``, float32 ``[U, 8, 4]``: words of the four high bytes, words of the four
    low bytes, and the sums of four integers, int32 ``[U, 8]`` each."""
    # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits. 128 more, and
    # byte 1 is hi, byte 0 is lo with its sign flipped.
    bits = (x * inverse + 12583040.0).to(tl.int32, bitcast=True)
    if PTX:
        # Four numbers in, the three results out, in the place of the first three.
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, t; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140;"
            " prmt.b32 $0, a, b, 0x7632; prmt.b32 t, a, b, 0x5410; xor.b32 $1, t, 0x80808080;"
            " dp4a.s32.s32 t, $0, 0x01010101, 0; shl.b32 t, t, 8;"
            " dp4a.s32.s32 $2, $1, 0x01010101, t; mov.b32 $3, 0; }",
            "=r,=r,=r,=r,r,r,r,r",
            [bits],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        even, odd = tl.split(bits.reshape(x.shape[0], 8, 2, 2))
        high, total = tl.split(even)
        low, _nothing = tl.split(odd)
    else:
        shift = (tl.arange(0, 4) * 8)[None, None, :]
        high = tl.sum(((bits >> 8) & 0xFF) << shift, axis=2)
        low = tl.sum(((bits & 0xFF) ^ 0x80) << shift, axis=2)
        total = tl.sum(bits - 0x4B400080, axis=2)
    return high, low, total


@triton.jit
def load_run(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    RUN: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    RUNS: tl.constexpr,
    OFFSET: tl.constexpr,
    PTX: tl.constexpr,
):
    """What run RUN of each chunk meets of x, or of x times the norm's weight: both bytes ``[1, 1,
    CHUNKS, 4]``; the scale, the sum times the format's offset, and the sum itself in x's own units,
    ``[1, 1, CHUNKS, 1]``. And sums of squares of x, float32 ``[CHUNKS / 2, 8]``."""
    UNITS: tl.constexpr = CHUNKS // 2
    unit = tl.arange(0, UNITS)[:, None, None]
    place = (tl.arange(0, 8) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    column = unit * (32 * RUNS) + (32 * RUN + place)
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=2)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + column, mask=column < K, other=0.0)
    largest = tl.max(tl.max(tl.abs(x), axis=2), axis=1)
    inverse = 32639.0 / tl.maximum(largest, 1e-30)  # finite for blocks of zeros too
    high, low, total = _pack(x, inverse[:, None, None], PTX)
    scale = (largest * (1.0 / 32639.0))[:, None].broadcast_to(UNITS, 2).reshape(1, 1, CHUNKS, 1)
    total = tl.sum(total.reshape(UNITS, 2, 4), axis=2).reshape(1, 1, CHUNKS, 1)
    run = (
        high.reshape(1, 1, CHUNKS, 4),
        low.reshape(1, 1, CHUNKS, 4),
        scale,
        total * OFFSET,
        total.to(tl.float32) * scale,
    )
    return run, squares


@triton.jit
def scaled_by(run, factor):  # type: ignore[no-untyped-def]
    """A run of ``factor * x``."""
    return run[0], run[1], run[2] * factor, run[3], run[4] * factor
