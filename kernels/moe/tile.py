"""What the kernels share that compute a tile of sorted pairs (:mod:`squall.kernels.moe.sort`)."""

from squall.kernels.lang import tl, triton
from squall.kernels.linear_epilogue import finish_tile


@triton.jit
def tile_places(  # type: ignore[no-untyped-def]
    m, order_ptr, rows, BLOCK_M: tl.constexpr, SHARE: tl.constexpr, GATHER: tl.constexpr
):
    """Places of tile ``m``, which of them have a pair, and their rows of x, ``[BLOCK_M]`` each: the
    token of the pair, of which there are SHARE a token, or (without GATHER) the place."""
    slot = tl.arange(0, BLOCK_M)
    place = m.to(tl.int64) * BLOCK_M + slot
    inside = slot < rows
    x_row = place
    if GATHER:
        x_row = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int64) // SHARE
    return place, inside, x_row


@triton.jit
def finish_places(  # type: ignore[no-untyped-def]
    z, bias_ptr, y_ptr, place, inside, features, y_stride, tile, ACTIVATION: tl.constexpr
):
    """Bias, activation and store of a finished tile ``z [weight rows, BLOCK_M]``; ``bias_ptr`` and
    ``tile`` are of the expert's own rows."""
    NOWHERE: tl.constexpr = 1 << 30
    row = tl.where(inside, place, NOWHERE)
    finish_tile(z, bias_ptr, y_ptr, row, NOWHERE, features, y_stride, tile, ACTIVATION, False)
