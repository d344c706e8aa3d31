"""Products of many pairs of token and expert with weights in planes, on tensor cores: those of
:mod:`squall.kernels.moe.grouped`, with weights dequantised as :mod:`squall.kernels.quant.gemm`
does. The planes have the rows of all experts, one below the other.
"""

import torch
from torch import Tensor

from squall.kernels.lang import TensorDescriptor, describable, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import weight_rows
from squall.kernels.moe.sort import Tiles
from squall.kernels.moe.tile import finish_places, tile_places
from squall.kernels.op import dependent_launch, has_ptx
from squall.kernels.quant.gemm import as_words, described, launch_config
from squall.kernels.quant.gemm_dequant import GAIN
from squall.kernels.quant.gemm_kernel import load_weights, use
from squall.kernels.quant.planes import SUPER, Layout, Tensors, layout, padded
from squall.kernels.tuning import Config


@kernel(do_not_specialize=["features", "tiles", "units"])
def _plane_grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_desc,
    low_tiles,
    high_tiles,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    order_ptr,
    experts_ptr,
    rows_ptr,
    features,
    tiles,
    units,
    x_stride,
    y_stride,
    K: tl.constexpr,
    SHARE: tl.constexpr,
    GATHER: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    GAIN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs x tiles of weight rows,). ``units`` are columns of the planes by 256;
    descriptors and scales as ``plane_gemm_kernel`` takes them, for all experts; ``x_desc``
    describes sorted rows by ``[BLOCK_M, BLOCK_K]``, without it x is read by pointer."""
    GATED: tl.constexpr = ACTIVATION != "none"
    WORDS: tl.constexpr = 2 if KIND == "half_pair" or (KIND == "byte_pair" and GROUP == 16) else 1
    SCALES: tl.constexpr = BLOCK_K // 128 if KIND == "power" else BLOCK_K // 64 * WORDS
    ROW_SCALES: tl.constexpr = SCALES * 256 // BLOCK_K  # words for 256 columns
    tile, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wait_for_inputs(PDL)
    rows = tl.load(rows_ptr + m)
    if rows > 0:
        expert = tl.load(experts_ptr + m)
        column = tl.arange(0, BLOCK_K)
        place, inside, x_row = tile_places(m, order_ptr, rows, BLOCK_M, SHARE, GATHER)
        x_tile = x_ptr + (x_row * x_stride)[:, None] + column[None, :]
        first_row = expert.to(tl.int64) * (features * (2 if GATED else 1))
        feature = tile * (BLOCK_N // 2 if GATED else BLOCK_N)
        w_row = first_row + weight_rows(tile, features, BLOCK_N, GATED)
        scale_word = tl.arange(0, SCALES)[None, :]
        scales_tile = scales_ptr + (w_row * (units * ROW_SCALES))[:, None] + scale_word
        matrix = expert * (2 if GATED else 1)
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            if x_desc is not None:
                x = x_desc.load([m * BLOCK_M, i * BLOCK_K])
            else:
                mask = inside[:, None] & (column < K - i * BLOCK_K)[None, :]
                x = tl.load(x_tile + i * BLOCK_K, mask=mask, other=0.0)
            w = load_weights(
                low_tiles, high_tiles, scales_tile, supers_ptr, w_row * units, matrix, feature, i,
                LOW_BITS, HIGH_BITS, OFFSET, GROUP, KIND, PAIRED, GAIN, BLOCK_N, BLOCK_K, x.dtype,
                PTX,
            )  # fmt: skip
            z = use(tl.dot(w, x.T, z), PTX)
        z *= 1.0 / GAIN
        if bias_ptr is not None:
            bias_ptr += first_row
        finish_places(z, bias_ptr, y_ptr, place, inside, features, y_stride, tile, ACTIVATION)


def rule(plan: Layout, block: int) -> Config:
    """Launch parameters for tiles of ``block`` pairs."""
    if block <= 32:
        return launch_config(plan, (block, 64, 256), 1, 4, 70)
    if block <= 64:
        return launch_config(plan, (block, 128, 128), 1, 4, 70)
    return launch_config(plan, (block, 128, 128), 1, 8, 100)


def plane_grouped(
    x: Tensor,
    planes: Tensors,
    ggml_type: int,
    bias: Tensor | None,
    tiles: Tiles,
    share: int,
    activation: str,
    y: Tensor,
) -> None:
    """Write ``y [places, F]``; ``x`` is ``[T, K]``, of ``share`` pairs a token, or ``[places, K]``
    (``share`` 0). Rows of x and y may be strided; ``bias [E, N]`` is contiguous."""
    (low, high, scales, supers), plan = planes, layout(ggml_type)
    features, k = y.shape[1], x.shape[1]
    gates = 1 + (activation != "none")
    assert x.dtype in (torch.float16, torch.bfloat16), f"x {x.dtype}"
    assert low.shape[1] * 32 == padded(k) * plan.low_bits, f"x {x.shape}, low {low.shape}"
    assert low.shape[0] % (features * gates) == 0, f"low {low.shape}, y {y.shape}"
    assert x.stride(1) == y.stride(1) == 1, "rows must be dense"
    config = rule(plan, tiles.block)
    block_n, block_k = config["block_n"], config["block_k"]
    tile = gates, block_n // gates, block_k
    sorted_rows = None
    if share == 0 and describable(x):
        sorted_rows = TensorDescriptor.from_tensor(x, [tiles.block, block_k])
    ptx, launch = has_ptx(x.device), dependent_launch(x.device)
    limit = {"maxnreg": config["registers"]} if ptx else {}
    _plane_grouped_kernel[(tiles.total * -(-features * gates // block_n),)](
        x,
        sorted_rows,
        described(low, plan.low_bits, features, tile),
        None if high is None else described(high, plan.high_bits, features, tile),
        as_words(scales),
        None if supers is None else as_words(supers),
        bias,
        y,
        tiles.order,
        tiles.experts,
        tiles.rows,
        features,
        tiles.total,
        padded(k) // SUPER,
        x.stride(0),
        y.stride(0),
        k,
        max(1, share),
        share > 0,
        *(plan.low_bits, plan.high_bits, plan.offset, plan.group, plan.scales, plan.paired),
        GAIN,
        activation,
        tiles.block,
        block_n,
        block_k,
        ptx,
        bool(launch),
        num_warps=config["warps"],
        num_stages=config["stages"],
        **launch,
        **limit,
    )
