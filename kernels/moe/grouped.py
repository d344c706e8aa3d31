"""Products of many pairs of token and expert with dense weights, on tensor cores.

Two of them make up the experts of a layer (:mod:`squall.kernels.moe.dense`), both over the places
of sorted tiles (:mod:`squall.kernels.moe.sort`), which hold the pairs i of a token and an expert:

    gather     y[place of i] = act(x[i // share] w^T + bias)    x [T, K], y [places, F]
    scatter    y[i] = x[place of i] w^T + bias                  x [places, K], y [P, F]

with w and bias those of the pair's expert: ``w [E, N, K]`` of x's dtype, ``bias [E, N]``, N as
``linear_epilogue.Epilogue`` has it. Sums are float32. So what is between the two lies in the order
in which the second one reads it.

A program computes ``block_n`` weight rows of one expert for the pairs of one tile, transposed: the
tensor core's long side lies along the weight, so few pairs waste little. Weights and sorted rows
come by tensor descriptors where these can describe them, gathered rows by pointers. Programs with
the same rows of a weight are neighbours.
"""

import torch
from torch import Tensor

from squall.kernels.lang import TensorDescriptor, describable, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import finish_tile, weight_rows
from squall.kernels.moe.sort import Tiles
from squall.kernels.op import dependent_launch
from squall.kernels.tuning import Config


@kernel(do_not_specialize=["features", "tiles"])
def _grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_desc,
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
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs x tiles of weight rows,); EVEN: BLOCK_K divides K. ``w_desc`` describes
    ``[E, F, K]``, or with an activation ``[2 E, F, K]``, by ``[1 or 2, .., BLOCK_K]``, ``x_desc``
    sorted rows by ``[BLOCK_M, BLOCK_K]``; what has none is read by pointer."""
    GATED: tl.constexpr = ACTIVATION != "none"
    tile, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + m)
    if rows > 0:
        expert = tl.load(experts_ptr + m)
        slot, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        place = m.to(tl.int64) * BLOCK_M + slot
        pair = tl.load(order_ptr + place, mask=slot < rows, other=0).to(tl.int64)
        x_row, y_row = (pair // SHARE, place) if GATHER else (place, pair)
        x_tile = x_ptr + (x_row * K)[None, :] + column[:, None]
        first_row = expert.to(tl.int64) * (features * (2 if GATED else 1))
        feature = tile * (BLOCK_N // 2 if GATED else BLOCK_N)
        if w_desc is None:
            w_row = first_row + weight_rows(tile, features, BLOCK_N, GATED)
            w_tile = w_ptr + w_row[:, None] * K + column[None, :]
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            k = i * BLOCK_K
            if x_desc is not None:
                x = x_desc.load([m * BLOCK_M, k]).T
            else:
                inside = (slot < rows)[None, :]
                if not EVEN:
                    inside = inside & (column < K - k)[:, None]
                x = tl.load(x_tile + k, mask=inside, other=0.0)
            if w_desc is not None:
                w = w_desc.load([expert * (2 if GATED else 1), feature, k])
                w = w.reshape(BLOCK_N, BLOCK_K)
            else:
                w = tl.load(w_tile + k, mask=(column < K - k)[None, :], other=0.0)
            z = tl.dot(w, x, z, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += first_row
        NOWHERE: tl.constexpr = 1 << 30
        y_row = tl.where(slot < rows, y_row, NOWHERE)
        finish_tile(z, bias_ptr, y_ptr, y_row, NOWHERE, features, features, tile, ACTIVATION, False)


def rule(block: int, dtype: torch.dtype) -> Config:
    """Launch parameters for tiles of ``block`` pairs: as many bytes of weights in flight as shared
    memory holds while there are few pairs; tiles as large as registers allow when arithmetic
    counts, for every multiprocessor gets its tile's operands through L2."""
    if dtype == torch.float32:
        return {"block_n": 64, "block_k": 32, "warps": 4, "stages": 2}
    if block <= 32:
        return {"block_n": 64, "block_k": 128, "warps": 4, "stages": 4}
    if block <= 64:
        return {"block_n": 128, "block_k": 64, "warps": 4, "stages": 4}
    return {"block_n": 256, "block_k": 64, "warps": 8, "stages": 3}


def gather(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    share: int,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """``y [places, F]``, undefined where a place has no pair; ``x [T, K]``, ``share`` pairs a
    token."""
    features = w.shape[1] // (1 + (activation != "none"))
    y = torch.empty((tiles.total * tiles.block, features), dtype=x.dtype, device=x.device)
    _launch(x, w, bias, tiles, share, activation, y, config)
    return y


def scatter(
    x: Tensor, w: Tensor, bias: Tensor | None, tiles: Tiles, y: Tensor, config: Config | None = None
) -> None:
    """Write ``y [P, N]``; ``x [places, K]``."""
    _launch(x, w, bias, tiles, 0, "none", y, config)


def _launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    share: int,
    activation: str,
    y: Tensor,
    config: Config | None,
) -> None:
    """``share`` 0: scatter."""
    (experts, _, k), features = w.shape, y.shape[1]
    gates = 1 + (activation != "none")
    assert x.dtype == w.dtype == y.dtype, f"x {x.dtype}, w {w.dtype}"
    assert w.shape[1] == features * gates and x.shape[1] == k, f"w {w.shape}, x {x.shape}"  # noqa: PT018
    assert w.is_contiguous() and x.is_contiguous() and y.is_contiguous(), "rows"  # noqa: PT018
    config = config or rule(tiles.block, w.dtype)
    block_n, block_k = config["block_n"], config["block_k"]
    weights = sorted_rows = None
    if describable(w.view(-1, k)):
        shape, strides = [experts * gates, features, k], [features * k, k, 1]
        weights = TensorDescriptor(w, shape, strides, [gates, block_n // gates, block_k])
    if share == 0 and describable(x):
        sorted_rows = TensorDescriptor.from_tensor(x, [tiles.block, block_k])
    launch = dependent_launch(x.device)
    _grouped_kernel[(tiles.total * -(-features * gates // block_n),)](
        x, sorted_rows, w, weights, bias, y, tiles.order, tiles.experts, tiles.rows, features,
        tiles.total, k, max(1, share), share > 0, activation, tiles.block, block_n, block_k,
        k % block_k == 0, "ieee" if w.dtype == torch.float32 else "tf32", bool(launch),
        num_warps=config["warps"], num_stages=config["stages"], **launch,
    )  # fmt: skip
