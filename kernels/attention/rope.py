"""Head norm and rotary embedding of heads in registers, for kernels that use them at once.

The arithmetic of ``squall.kernels.attention.rope_store``. A head is held twice: as it is, and with
each dimension replaced by its partner, the one it is rotated with. So a rotation needs no exchange
between threads: ``y_d = x_d cos + x_partner(d) (-sin or sin)``.
"""

from squall.kernels.lang import tl, triton


@triton.jit
def _partner(HALF: tl.constexpr, BLOCK_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of every dimension; without meaning for those that are not rotated."""
    d = tl.arange(0, BLOCK_DIM)
    ALIGNED: tl.constexpr = HALF & -HALF  # what may be loaded at once
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    return tl.max_contiguous(tl.multiple_of(partner, ALIGNED), ALIGNED)


@triton.jit
def load_heads(  # type: ignore[no-untyped-def]
    x_ptr, head, there, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Heads [N] of ``x_ptr`` [.., DIM] and their partners, [N, BLOCK_DIM]; others are zero."""
    d = tl.arange(0, BLOCK_DIM)
    partner = _partner(HALF, BLOCK_DIM)
    row_ptr = x_ptr + head[:, None] * DIM
    x = tl.load(row_ptr + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
    rotated = there[:, None] & (d < 2 * HALF)[None, :]
    return x, tl.load(row_ptr + partner[None, :], mask=rotated, other=0.0)


@triton.jit
def load_angles(row_ptr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine of every dimension, and the sine with the sign its partner gets, [BLOCK_DIM]."""
    d = tl.arange(0, BLOCK_DIM)
    ALIGNED: tl.constexpr = HALF & -HALF
    pair = tl.where(d < HALF, d, d - HALF)
    pair = tl.max_contiguous(tl.multiple_of(pair, ALIGNED), ALIGNED)
    cos = tl.load(row_ptr + pair, mask=d < 2 * HALF, other=1.0)
    sin = tl.load(row_ptr + HALF + pair, mask=d < 2 * HALF, other=0.0)
    return cos, tl.where(d < HALF, -sin, sin)


@triton.jit
def turned(  # type: ignore[no-untyped-def]
    x, partner, norm_ptr, eps, cos, sin, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Normed (if NORM) and rotated heads, float32 [N, BLOCK_DIM]."""
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        d = tl.arange(0, BLOCK_DIM)
        weight = tl.load(norm_ptr + d, mask=d < DIM, other=0.0)
        others = tl.load(norm_ptr + _partner(HALF, BLOCK_DIM), mask=d < 2 * HALF, other=0.0)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = x * weight[None, :] * factor
        partner = partner * others[None, :] * factor
    return x * cos[None, :] + partner * sin[None, :]
