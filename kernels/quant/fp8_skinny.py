"""Products of up to 256 rows with a block-scaled FP8 weight, on tensor cores.

``y = act(x w^T + bias)`` or ``stream += x w^T + bias``, x ``[M, K]`` float16 or bfloat16, w as in
:mod:`squall.kernels.quant.fp8`; the epilogue is ``linear_epilogue.Epilogue``. Activations are not
quantised: in registers, codes become numbers of x's dtype, which loses nothing, and a block's
sums are multiplied by its scales in float32. Tiles, and the parts of K that share one, are those of
:mod:`squall.kernels.linear_skinny`; a step is one block of 128 columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import (
    Epilogue,
    finish_tile,
    is_last_part,
    sum_of_parts,
    weight_rows,
)
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors
from squall.kernels.quant.fp8 import BLOCK, blocks_of, e4m3
from squall.kernels.tuning import Config

MAX_ROWS = 256


@triton.jit
def numbers(words, DTYPE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 words of two codes ``[N, X]`` -> DTYPE (float16, bfloat16) ``[N, 2 X]``, by 256."""
    words = words.to(tl.int32)
    if PTX and tl.float16 == DTYPE:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 a, s; prmt.b32 a, $1, 0, 0x1404; shr.u32 s, a, 1;"
            " and.b32 s, s, 0x3F803F80; lop3.b32 $0, a, 0x80008000, s, 0xEA; }",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif PTX:
        # With e4m3's exponent in the lowest bits of bfloat16's the numbers are 2^-120 of what they
        # are; 0x7780 is 2^112.
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 a, s, gain, zero; mov.b32 gain, 0x77807780; mov.b32 zero, 0x80008000;"
            " prmt.b32 a, $1, 0, 0x1404; shr.u32 s, a, 4; and.b32 s, s, 0x07F007F0;"
            " lop3.b32 s, a, 0x80008000, s, 0xEA; fma.rn.bf16x2 $0, s, gain, zero; }",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    if PTX:
        first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        first, second = e4m3(words).to(DTYPE), e4m3(words >> 8).to(DTYPE)
    return tl.join(first, second).reshape(words.shape[0], 2 * words.shape[1])


@kernel(do_not_specialize=["rows", "features"])
def _fp8_skinny_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    features,
    K,
    x_stride,
    w_stride,
    scales_stride,
    y_stride,
    HEIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles, SPLIT). ``w``, ``w_stride`` are in int16 words. ``features`` are columns of y;
    BLOCK_M >= rows; EVEN: BLOCK_K divides K, which is even.

    ``partial_ptr`` float32 [tiles, SPLIT, BLOCK_N, BLOCK_M], ``counter_ptr`` int32 [tiles].
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    w_row = weight_rows(tile, features, BLOCK_N, ACTIVATION != "none")
    blocks = tl.cdiv(K, BLOCK_K)
    wait_for_inputs(PDL)
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 2)[None, :]
    w_tile = w_ptr + w_row[:, None] * w_stride + word
    scales_tile = scales_ptr + (w_row // HEIGHT) * scales_stride
    x_tile = x_ptr + row[None, :] * x_stride + column[:, None]
    x_mask = (row < rows)[None, :]
    z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(blocks * part // SPLIT, blocks * (part + 1) // SPLIT):
        k = i * BLOCK_K
        scale = tl.load(scales_tile + i) * 256.0
        if EVEN:
            words = tl.load(w_tile + k // 2, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask=x_mask, other=0.0)
        else:
            inside = column < K - k
            w_mask = word < (K - k) // 2
            words = tl.load(w_tile + k // 2, mask=w_mask, other=0, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask=x_mask & inside[:, None], other=0.0)
        z += tl.dot(numbers(words, x.dtype, PTX), x) * scale[:, None]

    if SPLIT == 1:
        finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
    else:
        parts_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
        if is_last_part(z, parts_ptr, counter_ptr + tile, part, SPLIT):
            z = sum_of_parts(parts_ptr, counter_ptr + tile, BLOCK_N, BLOCK_M, SPLIT)
            finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)


def _config(block_n: int, split: int, warps: int, stages: int) -> Config:
    return {"skinny": 1, "block_n": block_n, "split": split, "warps": warps, "stages": stages}


def rule(bucket: int, weights: int, k: int, device: torch.device) -> Config:
    """Launch parameters for up to 64 rows of x and ``weights`` rows of w where no table has the
    problem: four programs a multiprocessor, or three where x takes more shared memory than the
    weights, with at least four blocks of columns each."""
    programs, stages = (4, 4) if bucket <= 32 else (3, 3)
    wanted = programs * multiprocessors(device) // -(-weights // 64)
    return _config(64, max(1, min(wanted, blocks_of(k) // 4, 8)), warps=4, stages=stages)


def candidates(bucket: int, weights: int, k: int) -> Iterator[Config]:
    """Launch parameters worth measuring for ``bucket`` rows of x and ``weights`` rows of w."""
    tiles: tuple[tuple[int, int, int], ...]
    if bucket <= 32:
        tiles = ((32, 4, 4), (64, 4, 4), (64, 4, 5), (128, 4, 4), (128, 8, 4))
    elif bucket <= 128:
        tiles = ((64, 4, 2), (64, 4, 3), (128, 8, 3))
    else:
        tiles = ((64, 4, 2), (64, 8, 2), (128, 8, 2))
    for block_n, warps, stages in tiles:
        count = -(-weights // block_n)
        # One to four programs a multiprocessor of a GPU with 132.
        splits = {max(1, min(round(n * 132 / count), blocks_of(k) // 2, 16)) for n in (1, 2, 3, 4)}
        for split in sorted(splits):
            yield _config(block_n, split, warps, stages)


def supports(data: Tensor) -> bool:
    """Whether the kernel can read this weight."""
    return data.shape[1] % 2 == 0 and data.stride(0) % 2 == 0 and data.storage_offset() % 2 == 0


def skinny(
    x: Tensor, weight: tuple[Tensor, Tensor, int], epilogue: Epilogue, config: Config
) -> None:
    """Write ``epilogue.out`` (see the module's docstring); ``1 <= M <= 256``; ``weight`` is data,
    scales, height."""
    data, scales, height = weight
    epilogue.check(x, data)
    assert x.dtype in (torch.float16, torch.bfloat16), f"x {x.dtype}"
    assert 1 <= x.shape[0] <= MAX_ROWS, f"x {x.shape}"
    assert supports(data), f"data {data.shape}"
    out, k = epilogue.out, data.shape[1]
    block_m, block_n = max(8, next_power_of_2(x.shape[0])), config["block_n"]
    split = config["split"]
    tiles = -(-epilogue.features // (block_n // 2 if epilogue.gated else block_n))
    partial = arrivals = None
    if split > 1:
        assert tiles <= COUNT, f"{tiles} tiles in {split} parts"
        arrivals = counters(x.device)
        partial = torch.empty(tiles * split * block_n * block_m, device=x.device)
    pdl = dependent_launch(x.device)
    _fp8_skinny_kernel[(tiles, split)](
        x, data.view(torch.int16), scales, epilogue.bias, out, partial, arrivals, x.shape[0],
        epilogue.features, k, x.stride(0), data.stride(0) // 2, scales.stride(0), out.stride(0),
        height, epilogue.activation, epilogue.add, block_m, block_n, BLOCK, split, k % BLOCK == 0,
        has_ptx(x.device), bool(pdl), num_warps=config["warps"], num_stages=config["stages"], **pdl,
    )  # fmt: skip
