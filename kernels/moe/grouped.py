"""Products of many pairs of token and expert with dense weights, on tensor cores.

    y[place of i] = act(x[token of i] w^T + bias)     x [T, K], of ``share`` pairs a token
    y[place of i] = act(x[place of i] w^T + bias)     x [places, K] (``share`` 0)

for every pair i of a token and an expert, over the places of sorted tiles
(:mod:`squall.kernels.moe.sort`), with w and bias those of the expert: ``w [E, N, K]`` of x's dtype,
``bias [E, N]``; y is ``[places, F]``, N and F as ``linear_epilogue.Epilogue`` has them. Sums are
float32. What is at places without a pair is undefined.

A program computes some weight rows of one expert for one tile. Small tiles are computed
transposed: the tensor core's long side lies along the weight, so few pairs waste little, and many
bytes of the weight are under way. Large ones (64 places and more) are as large as registers allow,
because a multiprocessor gets its operands through L2: and results leave by the TMA, for the
addresses of so many would not fit beside the sums. Weights and sorted rows come by tensor
descriptors, where these can describe them; gathered rows by pointers. Programs with the same rows
of a weight are neighbours.
"""

import torch
from torch import Tensor

from squall.kernels.lang import TensorDescriptor, describable, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import gate, weight_rows
from squall.kernels.moe.sort import Tiles
from squall.kernels.moe.tile import finish_places, tile_places
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
        column = tl.arange(0, BLOCK_K)
        place, inside, x_row = tile_places(m, order_ptr, rows, BLOCK_M, SHARE, GATHER)
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
                mask = inside[None, :]
                if not EVEN:
                    mask = mask & (column < K - k)[:, None]
                x = tl.load(x_tile + k, mask=mask, other=0.0)
            if w_desc is not None:
                w = w_desc.load([expert * (2 if GATED else 1), feature, k])
                w = w.reshape(BLOCK_N, BLOCK_K)
            else:
                w = tl.load(w_tile + k, mask=(column < K - k)[None, :], other=0.0)
            z = tl.dot(w, x, z, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_ptr += first_row
        finish_places(z, bias_ptr, y_ptr, place, inside, features, features, tile, ACTIVATION)


@kernel(do_not_specialize=["features", "tiles"])
def _large_grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_desc,
    w_desc,
    y_desc,
    bias_ptr,
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
    PDL: tl.constexpr,
):
    """As ``_grouped_kernel``; ``y_desc`` describes y by ``[BLOCK_M, BLOCK_N / 2]``."""
    GATED: tl.constexpr = ACTIVATION != "none"
    HALF: tl.constexpr = BLOCK_N // 2
    tile, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + m)
    if rows > 0:
        expert = tl.load(experts_ptr + m)
        if x_desc is None:
            column = tl.arange(0, BLOCK_K)
            _, inside, x_row = tile_places(m, order_ptr, rows, BLOCK_M, SHARE, True)
            x_tile = x_ptr + (x_row * K)[:, None] + column[None, :]
        feature = tile * (HALF if GATED else BLOCK_N)
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            k = i * BLOCK_K
            if x_desc is None:
                mask = inside[:, None] & (column < K - k)[None, :]
                x = tl.load(x_tile + k, mask=mask, other=0.0)
            else:
                x = x_desc.load([m * BLOCK_M, k])
            w = w_desc.load([expert * (2 if GATED else 1), feature, k]).reshape(BLOCK_N, BLOCK_K)
            z = tl.dot(x, w.T, z)
        if bias_ptr is not None:
            bias_ptr += expert.to(tl.int64) * (features * (2 if GATED else 1))
            w_row = weight_rows(tile, features, BLOCK_N, GATED)
            z += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
        # Halves, because a whole tile in float32 does not fit into shared memory beside its stages.
        left, right = tl.split(z.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        if GATED:
            y_desc.store([m * BLOCK_M, feature], gate(left, right, ACTIVATION).to(y_desc.dtype))
        else:
            y_desc.store([m * BLOCK_M, feature], left.to(y_desc.dtype))
            y_desc.store([m * BLOCK_M, feature + HALF], right.to(y_desc.dtype))


def rule(block: int, dtype: torch.dtype, large: bool) -> Config:
    """Launch parameters for tiles of ``block`` places; ``large``: for the kernel of large ones."""
    if large:
        return {"block_n": 256, "block_k": 64, "warps": 4 if block <= 64 else 8, "stages": 4}
    if dtype == torch.float32:
        return {"block_n": 64, "block_k": 32, "warps": 4, "stages": 2}
    if block <= 32:
        return {"block_n": 64, "block_k": 128, "warps": 4, "stages": 4}
    return {"block_n": 128, "block_k": 32, "warps": 8, "stages": 3}


def grouped(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    share: int,
    activation: str,
) -> Tensor:
    """``y`` (see the module's docstring)."""
    (experts, rows, k), gates = w.shape, 1 + (activation != "none")
    features = rows // gates
    assert x.dtype == w.dtype and x.shape[1] == k, f"x {x.dtype} {x.shape}, w {w.dtype} {w.shape}"  # noqa: PT018
    assert w.is_contiguous() and x.is_contiguous(), "rows must be dense"  # noqa: PT018
    y = torch.empty((tiles.total * tiles.block, features), dtype=x.dtype, device=x.device)
    weights = sorted_rows = None
    large = tiles.block >= 64 and describable(w[0]) and describable(y) and w.dtype != torch.float32
    config = rule(tiles.block, w.dtype, large)
    block_n, block_k = config["block_n"], config["block_k"]
    if describable(w[0]):
        shape, strides = [experts * gates, features, k], [features * k, k, 1]
        weights = TensorDescriptor(w, shape, strides, [gates, block_n // gates, block_k])
    if share == 0 and describable(x):
        sorted_rows = TensorDescriptor.from_tensor(x, [tiles.block, block_k])
    launch = dependent_launch(x.device)
    grid = (tiles.total * -(-rows // block_n),)
    sizes, described = (features, tiles.total, k), (tiles.order, tiles.experts, tiles.rows)
    options = {"num_warps": config["warps"], "num_stages": config["stages"], **launch}
    if large:
        _large_grouped_kernel[grid](
            x, sorted_rows, weights, TensorDescriptor.from_tensor(y, [tiles.block, block_n // 2]),
            bias, *described, *sizes, max(1, share), activation, tiles.block, block_n, block_k,
            bool(launch), **options,
        )  # fmt: skip
        return y
    _grouped_kernel[grid](
        x, sorted_rows, w, weights, bias, y, *described, *sizes, max(1, share), share > 0,
        activation, tiles.block, block_n, block_k, k % block_k == 0,
        "ieee" if w.dtype == torch.float32 else "tf32", bool(launch), **options,
    )  # fmt: skip
    return y
