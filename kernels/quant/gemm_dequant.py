"""Dequantisation for tensor cores: bits of planes become pairs of float16 in registers.

A run is 32 consecutive weights of a row; in every plane (see :mod:`squall.kernels.quant.planes`)
its bits are the same bits of 32 neighbouring bytes. Planes are read as int16, two weights a word,
``[N, 16]`` a run. A word's bytes are spread to the halves of an int32, the weight's bits are masked
there and OR-ed into 0x6400: as a float16 half that is ``1024 + q * 2**shift`` exactly. One packed
FMA gives ``q - offset``, exactly too, and a second ``(q - offset) * scale + minimum``. So a pair of
weights costs two or three integer operations and two packed FMAs, and lies in one register in the
order in which ``mma`` wants it.

``scale`` and ``minimum`` are float16 and so is the weight: all are rounded once, to 11 bits. They
are ``GAIN`` times too large, to keep the scales of small weights out of float16's subnormal range;
weights must be below 65504 / GAIN = 1023. bfloat16 weights are made from the float16 ones: CUDA
cores have no bfloat16 FMA that would keep the scale's bits, and converting costs two float32
conversions and a packed rounding for two weights where float32 arithmetic would cost more.

With ``PTX`` false the same steps run as plain Triton, in its interpreter and on other chips.
"""

from squall.kernels.lang import tl, triton

GAIN = 64


@triton.jit
def _halves(v):  # type: ignore[no-untyped-def]
    """int32 of two float16: the low one and the high one."""
    low = v.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (v >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _pack(low, high):  # type: ignore[no-untyped-def]
    """Inverse of ``_halves``."""
    bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _constant(low, high):  # type: ignore[no-untyped-def]
    """Two numbers as packed float16."""
    return _pack(tl.full([], low, tl.float16), tl.full([], high, tl.float16))


@triton.jit
def _fma(a, b, c, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a * b + c`` of packed float16."""
    if PTX:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
        )
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    c0, c1 = _halves(c)
    return _pack(a0 * b0 + c0, a1 * b1 + c1)


@triton.jit
def _mul(a, b, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a * b`` of packed float16."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    return _pack(a0 * b0, a1 * b1)


@triton.jit
def _spread(v, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes 0 and 1 of an int32, in its two halves."""
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x7170;", "=r,r", [v], tl.int32, is_pure=True, pack=1
        )
    return (v & 0xFF) | ((v & 0xFF00) << 8)


@triton.jit
def _masked(v, mask, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``v & mask | 0x64006400``: bits become packed float16 ``1024 + bits``."""
    if PTX:  # one instruction, which the compiler does not find
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x64006400, 0xEA;",
            "=r,r,r",
            [v, mask],
            tl.int32,
            is_pure=True,
            pack=1,
        )
    return (v & mask) | 0x64006400


@triton.jit
def _both(v, HALF: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low (0) or high (1) half of an int32 in both halves."""
    if PTX and HALF == 0:
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {l, l};}",
            "=r,r",
            [v],
            tl.int32,
            is_pure=True,
            pack=1,
        )
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, h};}",
            "=r,r",
            [v],
            tl.int32,
            is_pure=True,
            pack=1,
        )
    half = (v >> (16 * HALF)) & 0xFFFF
    return half | (half << 16)


@triton.jit
def super_scales(word, GAIN: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a group's scales are multiplied by, packed: (d, d) or (d, -dmin), times GAIN.

    ``word`` is int32 [N]: the two float16 of "byte_pair" or the one of "byte"; others have none.
    """
    if KIND == "byte_pair":
        return _mul(word, _constant(GAIN, -GAIN), PTX)
    elif KIND == "byte":
        return _mul(_both(word, 0, PTX), _constant(GAIN, GAIN), PTX)
    else:
        return _constant(GAIN, GAIN)


@triton.jit
def _two_scales(  # type: ignore[no-untyped-def]
    word, supers, HIGH: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr
):
    """The two float16 of ``word``, or two bytes of it: 0 and 1 or (HIGH) 2 and 3; times GAIN."""
    if KIND == "half" or KIND == "half_pair":
        return _mul(word, supers, PTX)
    BASE: tl.constexpr = -1152 if KIND == "byte" else -1024
    if KIND == "byte":
        word = word ^ -0x7F7F7F80  # int8 to uint8 + 128
    bytes = _masked(_spread(word >> 16 if HIGH else word, PTX), 0x00FF00FF, PTX)
    return _mul(_fma(bytes, _constant(1, 1), _constant(BASE, BASE), PTX), supers, PTX)


@triton.jit
def run_scales(  # type: ignore[no-untyped-def]
    words, supers, RUN: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr
):
    """Scale and minimum of run RUN (0, 1) of 64 weights: packed, twice each, ``[N, 16]`` or
    ``[N, 1]``.

    ``words`` are the scales of the 64 weights, one or two int32 ``[N]``. The minimum of formats
    without one means nothing.
    """
    if GROUP == 16:
        if KIND == "byte":
            v = _two_scales(words[0], supers, RUN, KIND, PTX)
            s0, s1 = _both(v, 0, PTX), _both(v, 1, PTX)
            m0, m1 = s0, s1
        else:
            v0 = _two_scales(words[RUN], supers, 0, KIND, PTX)
            v1 = _two_scales(words[RUN], supers, 1, KIND, PTX)
            s0, s1 = _both(v0, 0, PTX), _both(v1, 0, PTX)
            m0, m1 = _both(v0, 1, PTX), _both(v1, 1, PTX)
        first = (tl.arange(0, 16) < 8)[None, :]
        s = tl.where(first, s0[:, None], s1[:, None])
        m = tl.where(first, m0[:, None], m1[:, None])
    else:
        if KIND == "half":
            v = _two_scales(words[0], supers, 0, KIND, PTX)
            v = _both(v, RUN, PTX)
        elif KIND == "half_pair":
            v = _two_scales(words[RUN], supers, 0, KIND, PTX)
        else:
            v = _two_scales(words[0], supers, RUN, KIND, PTX)
        s = _both(v, 0, PTX)[:, None]
        m = _both(v, 1, PTX)[:, None]
    return s, m


@triton.jit
def run_weights(  # type: ignore[no-untyped-def]
    low,
    high,
    scale,
    minimum,
    LOW_SHIFT: tl.constexpr,
    HIGH_SHIFT: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    """The 32 weights of a run, times GAIN, as int32 ``[N, 16]`` of two float16 each.

    ``low``, ``high``: the run's words of the planes, int32 ``[N, 16]`` from ``spread_words``; its
    bits start at LOW_SHIFT and HIGH_SHIFT of each byte. With HIGH_BITS 0, ``high`` is not read.
    """
    if LOW_BITS == 8:
        low = low ^ 0x00800080  # int8 to uint8 + 128
    q = _masked(low, (((1 << LOW_BITS) - 1) << LOW_SHIFT) * 0x10001, PTX)
    if HIGH_BITS > 0:
        TOP: tl.constexpr = LOW_SHIFT + LOW_BITS
        MOVE: tl.constexpr = TOP - HIGH_SHIFT
        bits = high << MOVE if MOVE >= 0 else high >> -MOVE
        q |= bits & (((1 << HIGH_BITS) - 1) << TOP) * 0x10001
    UNIT: tl.constexpr = 1.0 / (1 << LOW_SHIFT)
    BASE: tl.constexpr = -1024.0 * UNIT - (128 if LOW_BITS == 8 else OFFSET)
    q = _fma(q, _constant(UNIT, UNIT), _constant(BASE, BASE), PTX)
    if PAIRED:
        return _fma(q, scale, minimum, PTX)
    return _mul(q, scale, PTX)


@triton.jit
def spread_words(words, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 (or the low half of int32) words of a plane -> int32, a byte in each half."""
    return _spread(words.to(tl.int32) & 0xFFFF, PTX)


@triton.jit
def two_runs(a, b, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two results of ``run_weights`` side by side: ``[N, 64]`` of DTYPE, float16 or bfloat16.

    Nothing moves between threads: each has the same columns of both runs.
    """
    # A select whose condition every thread knows at compile time: unlike a permutation it lets the
    # compiler load the planes in the layout that the tensor core wants.
    first = (tl.arange(0, 2) == 0)[None, :, None]
    v = tl.where(first, a[:, None, :], b[:, None, :]).reshape(a.shape[0], 32)
    low, high = _halves(v)
    if tl.bfloat16 == DTYPE:
        low, high = low.to(tl.float32).to(DTYPE), high.to(tl.float32).to(DTYPE)
    return tl.join(low, high).reshape(a.shape[0], 64)
