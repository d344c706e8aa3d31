"""Products of many pairs of token and expert with block-scaled FP8 weights, on tensor cores: those
of :mod:`squall.kernels.moe.grouped`, with numbers made of codes in registers as
:mod:`squall.kernels.quant.fp8_skinny` does. A block's sums are multiplied by its scales in float32.

``data`` is uint8 ``[E, N, K]``, ``scales`` float32 ``[E, N / height, blocks of K]``, as in
:mod:`squall.kernels.moe.fp8`.
"""

import torch
from torch import Tensor

from squall.kernels.lang import TensorDescriptor, describable, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import weight_rows
from squall.kernels.moe.sort import Tiles
from squall.kernels.moe.tile import finish_places, tile_places
from squall.kernels.op import dependent_launch, has_ptx
from squall.kernels.quant.fp8 import BLOCK, e4m3
from squall.kernels.quant.fp8_skinny import numbers
from squall.kernels.tuning import Config


@kernel(do_not_specialize=["features", "tiles"])
def _fp8_grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_desc,
    w_ptr,
    scales_ptr,
    y_ptr,
    order_ptr,
    experts_ptr,
    rows_ptr,
    features,
    tiles,
    K,
    scales_stride,
    SHARE: tl.constexpr,
    GATHER: tl.constexpr,
    HEIGHT: tl.constexpr,
    CODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs x tiles of weight rows,). ``w`` is in words of CODES codes: int16 of
    two, or uint8; ``x_desc`` describes sorted rows by ``[BLOCK_M, BLOCK_K]``, without it x is read
    by pointer; BLOCK_K divides 128, EVEN: and K."""
    GATED: tl.constexpr = ACTIVATION != "none"
    tile, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + m)
    if rows > 0:
        column = tl.arange(0, BLOCK_K)
        place, inside, x_row = tile_places(m, order_ptr, rows, BLOCK_M, SHARE, GATHER)
        x_tile = x_ptr + (x_row * K)[None, :] + column[:, None]
        first_row = tl.load(experts_ptr + m).to(tl.int64) * (features * (2 if GATED else 1))
        w_row = first_row + weight_rows(tile, features, BLOCK_N, GATED)
        word = tl.arange(0, BLOCK_K // CODES)[None, :]
        w_tile = w_ptr + (w_row * (K // CODES))[:, None] + word
        scales_tile = scales_ptr + w_row // HEIGHT * scales_stride
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            k = i * BLOCK_K
            scale = tl.load(scales_tile + k // 128) * 256.0
            if x_desc is not None:
                x = x_desc.load([m * BLOCK_M, k]).T
            else:
                mask = inside[None, :]
                if not EVEN:
                    mask = mask & (column < K - k)[:, None]
                x = tl.load(x_tile + k, mask=mask, other=0.0)
            if EVEN:
                words = tl.load(w_tile + k // CODES)
            else:
                words = tl.load(w_tile + k // CODES, mask=word < (K - k) // CODES, other=0)
            w = numbers(words, x.dtype, PTX) if CODES == 2 else e4m3(words).to(x.dtype)
            z += tl.dot(w, x, input_precision=PRECISION) * scale[:, None]
        finish_places(z, None, y_ptr, place, inside, features, features, tile, ACTIVATION)


def rule(block: int, dtype: torch.dtype) -> Config:
    """Launch parameters for tiles of ``block`` places. A block's products have sums of their own
    beside all sums, so tiles are smaller than those of dense weights: for Hopper, nothing spills.
    """
    if dtype == torch.float32:
        return {"block_n": 64, "block_k": 32, "warps": 4, "stages": 2}
    if block <= 32:
        return {"block_n": 64, "block_k": BLOCK, "warps": 4, "stages": 4}
    return {"block_n": 128 if block <= 64 else 64, "block_k": BLOCK, "warps": 8, "stages": 3}


def fp8_grouped(
    x: Tensor, data: Tensor, scales: Tensor, tiles: Tiles, share: int, activation: str
) -> Tensor:
    """``y [places, F]`` of x's dtype: ``x`` is ``[T, K]``, of ``share`` pairs a token, or
    ``[places, K]`` (``share`` 0)."""
    _, rows, k = data.shape
    features = rows // (1 + (activation != "none"))
    assert x.shape[1] == k, f"x {x.shape}, data {data.shape}"
    assert data.is_contiguous() and scales.is_contiguous(), "weights must be dense"  # noqa: PT018
    assert x.is_contiguous(), "rows must be dense"
    y = torch.empty((tiles.total * tiles.block, features), dtype=x.dtype, device=x.device)
    config = rule(tiles.block, x.dtype)
    block_n, block_k = config["block_n"], config["block_k"]
    sorted_rows = None
    if share == 0 and describable(x):
        sorted_rows = TensorDescriptor.from_tensor(x, [tiles.block, block_k])
    paired = k % 2 == 0 and data.storage_offset() % 2 == 0
    whole = x.dtype == torch.float32
    launch = dependent_launch(x.device)
    _fp8_grouped_kernel[(tiles.total * -(-rows // block_n),)](
        x, sorted_rows, data.view(torch.int16) if paired else data, scales, y, tiles.order,
        tiles.experts, tiles.rows, features, tiles.total, k, scales.shape[2], max(1, share),
        share > 0, rows // scales.shape[1], 1 + paired, activation, tiles.block, block_n, block_k,
        k % block_k == 0, "ieee" if whole else "tf32", has_ptx(x.device) and not whole,
        bool(launch), num_warps=config["warps"], num_stages=config["stages"], **launch,
    )  # fmt: skip
    return y
