"""Products of many pairs of token and expert with dense weights, on tensor cores.

``out[i] = act(x[i // share] w[expert of i]^T + bias[expert of i])`` for every pair ``i``: ``x``
``[P / share, K]`` and ``out [P, F]`` contiguous, ``w [E, N, K]`` of one dtype, ``bias [E, N]``, N
as ``linear_epilogue.Epilogue`` has it. Sums are float32.

A program computes ``block_n`` weight rows of one expert for the pairs of one of its tiles
(:mod:`squall.kernels.moe.sort`), transposed: the tensor core's long side lies along the weight, so
few pairs waste little. Weights come by tensor descriptors where these can describe them, rows of x,
which lie anywhere, by pointers. Programs with the same rows of a weight are neighbours.
"""

import torch
from torch import Tensor

from squall.kernels.lang import HAS_TRITON, describable, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import finish_tile, weight_rows
from squall.kernels.moe.sort import Tiles
from squall.kernels.op import dependent_launch
from squall.kernels.tuning import Config

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

NO_ROW = 1 << 30  # stands for places of a tile without a pair


@kernel(do_not_specialize=["features", "tiles"])
def _grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    w_desc,
    bias_ptr,
    y_ptr,
    order_ptr,
    experts_ptr,
    rows_ptr,
    features,
    tiles,
    K,
    SHARE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs x tiles of weight rows,); EVEN: BLOCK_K divides K. ``w_desc`` describes
    ``[E, F, K]``, or with an activation ``[2 E, F, K]``, by ``[1 or 2, .., BLOCK_K]``; None: the
    weight is read from ``w_ptr``."""
    GATED: tl.constexpr = ACTIVATION != "none"
    tile, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + m)
    if rows > 0:
        expert = tl.load(experts_ptr + m)
        slot, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        pair = tl.load(order_ptr + m * BLOCK_M + slot, mask=slot < rows, other=0).to(tl.int64)
        x_tile = x_ptr + (pair // SHARE * K)[None, :] + column[:, None]
        first_row = expert.to(tl.int64) * (features * (2 if GATED else 1))
        feature = tile * (BLOCK_N // 2 if GATED else BLOCK_N)
        if w_desc is None:
            w_row = first_row + weight_rows(tile, features, BLOCK_N, GATED)
            w_tile = w_ptr + w_row[:, None] * K + column[None, :]
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            k = i * BLOCK_K
            inside = (slot < rows)[None, :]
            if not EVEN:
                inside = inside & (column < K - k)[:, None]
            x = tl.load(x_tile + k, mask=inside, other=0.0)
            if w_desc is None:
                w = tl.load(w_tile + k, mask=(column < K - k)[None, :], other=0.0)
            else:
                w = w_desc.load([expert * (2 if GATED else 1), feature, k])
                w = w.reshape(BLOCK_N, BLOCK_K)
            z = tl.dot(w, x, z, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += first_row
        row = tl.where(slot < rows, pair, 1073741824)
        finish_tile(
            z, bias_ptr, y_ptr, row, 1073741824, features, features, tile, ACTIVATION, False
        )


def rule(block: int, dtype: torch.dtype) -> Config:
    """Launch parameters for tiles of ``block`` pairs: as many bytes of weights in flight as shared
    memory holds while there are few pairs, large tiles when arithmetic counts."""
    if dtype == torch.float32:
        return {"block_n": 64, "block_k": 32, "warps": 4, "stages": 2}
    if block <= 32:
        return {"block_n": 64, "block_k": 128, "warps": 4, "stages": 4}
    if block <= 64:
        return {"block_n": 128, "block_k": 64, "warps": 4, "stages": 4}
    return {"block_n": 128, "block_k": 64, "warps": 8, "stages": 4}


def grouped(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    activation: str,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Write ``out`` (see the module's docstring); ``tiles`` are of its pairs."""
    (pairs, features), (experts, _, k) = out.shape, w.shape
    gates = 1 + (activation != "none")
    assert x.dtype == w.dtype, f"x {x.dtype}, w {w.dtype}"
    assert w.shape[1] == features * gates, f"w {w.shape}, out {out.shape}, {activation}"
    assert x.shape[1] == k and pairs % x.shape[0] == 0, f"x {x.shape}, out {out.shape}"  # noqa: PT018
    assert w.is_contiguous() and x.is_contiguous() and out.is_contiguous(), "rows"  # noqa: PT018
    config = config or rule(tiles.block, w.dtype)
    block_n, block_k = config["block_n"], config["block_k"]
    weights = None
    if describable(w.view(-1, k)):
        shape, strides = [experts * gates, features, k], [features * k, k, 1]
        block = [gates, block_n // gates, block_k]
        weights = TensorDescriptor(w, shape, strides, block)
    launch = dependent_launch(x.device)
    grid = tiles.total * -(-features * gates // block_n)
    _grouped_kernel[(grid,)](
        x, w, weights, bias, out, tiles.order, tiles.experts, tiles.rows, features, tiles.total, k,
        pairs // x.shape[0], activation, tiles.block, block_n, block_k, k % block_k == 0,
        "ieee" if w.dtype == torch.float32 else "tf32", bool(launch),
        num_warps=config["warps"], num_stages=config["stages"], **launch,
    )  # fmt: skip
