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
weights must be below 65504 / GAIN = 1023. MXFP4's codes are float16's own bits but for their place,
and multiples of 2^-30 are exact. bfloat16 weights are made from the float16 ones: CUDA
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
def _item(v, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Item INDEX of the last of three axes, which has one, two or four."""
    N: tl.constexpr = v.shape[0]
    U: tl.constexpr = v.shape[1]
    if v.shape[2] == 1:
        item = v.reshape(N, U)
    elif v.shape[2] == 2:
        low, high = tl.split(v)
        item = low if INDEX == 0 else high
    else:
        even, odd = tl.split(v.reshape(N, U, 2, 2))
        low, high = tl.split(even if INDEX % 2 == 0 else odd)
        item = low if INDEX // 2 == 0 else high
    return item


@triton.jit
def _run_scales(  # type: ignore[no-untyped-def]
    words, supers, RUN: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr
):
    """Scales and minimums of run RUN of every unit: packed, twice each, ``[N, U, 16]`` or
    ``[N, U, 1]``.

    ``words`` are the scales, int32 ``[N, U, words of a unit]``; ``supers`` from ``super_scales``.
    The minimum of formats without one means nothing.
    """
    SIDE: tl.constexpr = RUN % 2
    if KIND == "byte_pair" and GROUP == 16:
        word = _item(words, RUN)
        v0 = _two_scales(word, supers, 0, KIND, PTX)[:, :, None]
        v1 = _two_scales(word, supers, 1, KIND, PTX)[:, :, None]
        s = _two_groups(_both(v0, 0, PTX), _both(v1, 0, PTX))
        m = _two_groups(_both(v0, 1, PTX), _both(v1, 1, PTX))
    elif KIND == "byte":
        v = _two_scales(_item(words, RUN // 2), supers, SIDE, KIND, PTX)[:, :, None]
        s = _two_groups(_both(v, 0, PTX), _both(v, 1, PTX))
        m = s
    elif KIND == "half":
        v = _two_scales(_item(words, 0), supers, 0, KIND, PTX)[:, :, None]
        s = _both(v, SIDE, PTX)
        m = s
    elif KIND == "power":
        # 2^(e - 127) is a float32 with the exponent e; what is beyond float16 stays finite, for it
        # may meet zeros.
        bits = ((_item(words, 0) >> (8 * RUN)) & 0xFF) << 23
        gain, _ = _halves(supers)
        v = tl.minimum(bits.to(tl.float32, bitcast=True) * gain.to(tl.float32), 32768.0)
        half = v.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        s = _both(half, 0, PTX)[:, :, None]
        m = s
    else:
        INDEX: tl.constexpr = SIDE if KIND == "half_pair" else 0
        v = _two_scales(_item(words, INDEX), supers, SIDE, KIND, PTX)[:, :, None]
        s = _both(v, 0, PTX)
        m = _both(v, 1, PTX)
    return s, m


@triton.jit
def _two_groups(a, b):  # type: ignore[no-untyped-def]
    """``[N, U, 1]`` each -> ``[N, U, 16]``: a for the first 16 weights of a run, b for the rest."""
    return tl.where((tl.arange(0, 16) < 8)[None, None, :], a, b)


@triton.jit
def _e2m1(low, SHIFT: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The e2m1 numbers whose four bits are at SHIFT of both halves of int32, as packed float16.

    With its exponent in the lowest bits of float16's a number is 2^-14 of what it is."""
    bits = low << (12 - SHIFT)
    bits = (bits & -0x7FFF8000) | ((bits >> 3) & 0x0E000E00)
    return _mul(bits, _constant(16384, 16384), PTX)


@triton.jit
def _run_weights(  # type: ignore[no-untyped-def]
    low,
    high,
    scale,
    minimum,
    RUN: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    """Run RUN of every unit, times GAIN, as int32 ``[N, U, 16]`` of two float16 each.

    ``low`` ``[N, U, 16]``: a byte of the low plane in each half; ``high``: one of the high plane in
    the upper byte of each half, run 0 of the unit at its bottom. With HIGH_BITS 0, ``high`` is not
    read.
    """
    SHIFT: tl.constexpr = RUN * LOW_BITS
    if KIND == "power":
        return _mul(_e2m1(low, SHIFT, PTX), scale, PTX)
    if LOW_BITS == 8:
        low = low ^ 0x00800080  # int8 to uint8 + 128
    q = _masked(low, (((1 << LOW_BITS) - 1) << SHIFT) * 0x10001, PTX)
    if HIGH_BITS > 0:
        TOP: tl.constexpr = SHIFT + LOW_BITS
        bits = high >> (8 - TOP + HIGH_BITS * RUN)
        q |= bits & (((1 << HIGH_BITS) - 1) << TOP) * 0x10001
    UNIT: tl.constexpr = 1.0 / (1 << SHIFT)
    BASE: tl.constexpr = -1024.0 * UNIT - (128 if LOW_BITS == 8 else OFFSET)
    q = _fma(q, _constant(UNIT, UNIT), _constant(BASE, BASE), PTX)
    return _fma(q, scale, minimum, PTX) if PAIRED else _mul(q, scale, PTX)


@triton.jit
def _stack(a, b):  # type: ignore[no-untyped-def]
    """``[N, U, X]`` twice -> ``[N, U, 2 X]``, a before b; nothing moves between threads."""
    # A select whose condition every thread knows at compile time: unlike a permutation it lets the
    # compiler load the planes in the layout that the tensor core wants.
    first = (tl.arange(0, 2) == 0)[None, None, :, None]
    both = tl.where(first, a[:, :, None, :], b[:, :, None, :])
    return both.reshape(a.shape[0], a.shape[1], 2 * a.shape[2])


@triton.jit
def _high_bytes(words, SHARE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 words of the high plane ``[N, X]`` -> int32 ``[N, X / 16 * SHARE, 16]``, a byte in the
    upper byte of each half, for SHARE units of the low plane; the BITS of each at the bottom."""
    N: tl.constexpr = words.shape[0]
    UNITS: tl.constexpr = words.shape[1] // 16
    v = words.to(tl.int32)
    if PTX:
        v = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x1404;", "=r,r", [v], tl.int32, is_pure=True, pack=1
        )
    else:
        v = ((v & 0xFF) << 8) | ((v & 0xFF00) << 16)
    v = v.reshape(N, UNITS, 1, 16)
    if SHARE > 1:
        v = v >> (tl.arange(0, SHARE) * BITS)[None, None, :, None]
    return v.reshape(N, UNITS * SHARE, 16)


@triton.jit
def _two_runs(  # type: ignore[no-untyped-def]
    low, high, words, supers, RUN: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Runs RUN and RUN + 1 of every unit: int32 ``[N, U, 32]``."""
    s0, m0 = _run_scales(words, supers, RUN, GROUP, KIND, PTX)
    s1, m1 = _run_scales(words, supers, RUN + 1, GROUP, KIND, PTX)
    return _stack(
        _run_weights(low, high, s0, m0, RUN, LOW_BITS, HIGH_BITS, OFFSET, KIND, PAIRED, PTX),
        _run_weights(low, high, s1, m1, RUN + 1, LOW_BITS, HIGH_BITS, OFFSET, KIND, PAIRED, PTX),
    )


@triton.jit
def dequantize_tile(  # type: ignore[no-untyped-def]
    low,
    high,
    scales,
    supers,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Words of the planes of a tile -> weights times GAIN, ``[N, K]`` of DTYPE (float16, bfloat16).

    ``low``, ``high`` are int16 ``[N, words]``, ``scales`` int32 ``[N, words]``, ``supers`` from
    ``super_scales``.
    """
    N: tl.constexpr = low.shape[0]
    U: tl.constexpr = low.shape[1] // 16
    RUNS: tl.constexpr = 8 // LOW_BITS
    low = _spread(low.to(tl.int32), PTX).reshape(N, U, 16)
    if HIGH_BITS > 0:
        high = _high_bytes(high, 8 // HIGH_BITS // RUNS, HIGH_BITS * RUNS, PTX)
    if LOW_BITS == 8:  # a word has the scales of two units
        v = _mul(scales, supers, PTX)
        s = tl.join(_both(v, 0, PTX), _both(v, 1, PTX)).reshape(N, U, 1)
        w = _run_weights(low, high, s, s, 0, LOW_BITS, HIGH_BITS, OFFSET, KIND, PAIRED, PTX)
    else:
        if KIND == "power":  # a word has the scales of two units
            words = tl.join(scales, scales >> 16).reshape(N, U, 1)
        else:
            words = scales.reshape(N, U, scales.shape[1] // U)
        w = _two_runs(
            low, high, words, supers, 0, LOW_BITS, HIGH_BITS, OFFSET, GROUP, KIND, PAIRED, PTX
        )
        if RUNS == 4:
            rest = _two_runs(
                low, high, words, supers, 2, LOW_BITS, HIGH_BITS, OFFSET, GROUP, KIND, PAIRED, PTX
            )
            w = _stack(w, rest)
    first, second = _halves(w)
    if tl.bfloat16 == DTYPE:
        first, second = first.to(tl.float32).to(DTYPE), second.to(tl.float32).to(DTYPE)
    return tl.join(first, second).reshape(N, U * RUNS * 32)
