"""MXFP4's codes and exponents in kernels (:mod:`squall.kernels.quant.gguf_mxfp4`)."""

from squall.kernels.lang import tl, triton


@triton.jit
def integer(code):  # type: ignore[no-untyped-def]
    """What codes, int32 from 0 to 15, stand for: twice an e2m1 number, -12 to 12."""
    low = code & 7
    size = tl.where(low < 2, low, (((low & 1) | 2) << (low >> 1)) >> 1)
    return tl.where(code > 7, -size, size)


@triton.jit
def power(exponent):  # type: ignore[no-untyped-def]
    """``2^(e - 128)`` of int32 exponents from 0 to 255: float32, exactly, subnormal or not."""
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def four_integers(codes, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``integer`` of the four bytes of an int32, as four int8."""
    if PTX:
        # The codes side by side in 16 bits select from a table of the positive and one of the
        # negative numbers; their high bits then select from the two.
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t, plus, minus;"
            " shr.u32 s, $1, 4; or.b32 s, s, $1; prmt.b32 s, s, 0, 0x4420;"
            " and.b32 t, s, 0x7777; prmt.b32 plus, 0x03020100, 0x0C080604, t;"
            " prmt.b32 minus, 0xFDFEFF00, 0xF4F8FAFC, t;"
            " shr.u32 s, s, 1; and.b32 s, s, 0x4444; or.b32 s, s, 0x3210;"
            " prmt.b32 $0, plus, minus, s; }",
            "=r,r",
            [codes],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        numbers = codes * 0
        for byte in tl.static_range(4):
            numbers |= (integer((codes >> (8 * byte)) & 15) & 0xFF) << (8 * byte)
    return numbers
