"""Products of one row with a block-scaled FP8 weight: one launch for all of

    x' = x                              or  x / sqrt(mean(x^2) + eps) * norm
    y  = act(x' w^T + bias)             or  stream += x' w^T + bias

as :mod:`squall.kernels.linear_gemv` has them for dense weights, and for the same reasons in the
same way: as many programs as the GPU holds at once keep x in registers and walk over the rows of
the weight, a tile of rows in flight while the one before is summed. ``x [1, K]`` is float16,
bfloat16 or float32 (with ``norm`` float32), K a multiple of 16; the weight as in
:mod:`squall.kernels.quant.fp8`, its rows aligned to 16 bytes; the epilogue is
``linear_epilogue.Epilogue``. Neither x nor weights are rounded; sums are float32.

With experts, data and scales are those of all experts, one below the other, and a row of the result
is the product of a row of x with the expert that ``ids`` (int32 ``[P]``) names: row ``i`` of
``[P, F]`` takes row ``i // share`` of x.

A thread owns chunks of 16 columns, which share a scale: it multiplies the sum of a chunk. All
tensors are ``[1, weight rows, chunks, words]``, so nothing crosses threads before the last sum.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import Epilogue, finish_row, weight_rows
from squall.kernels.op import dependent_launch, multiprocessors
from squall.kernels.tuning import Config

MAX_K = 32768


@triton.jit
def _load_x(ptr, chunk, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """What bytes 0 to 3 of the words of each chunk meet: four float32 ``[1, 1, CHUNKS, 4]``."""
    column = chunk * 16 + tl.arange(0, 4)[None, None, None, :] * 4
    ptr += column
    inside = column < K
    return (
        tl.load(ptr, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 1, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 2, mask=inside, other=0.0).to(tl.float32),
        tl.load(ptr + 3, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _halves(bits):  # type: ignore[no-untyped-def]
    """Two float16 in an int32, as float32."""
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    w_ptr,
    scales_ptr,
    tile,
    tiles,
    features,
    w_stride,
    scales_stride,
    chunk,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Words ``[1, TILE, CHUNKS, 4]`` and scales ``[1, TILE, CHUNKS, 1]`` of tile number ``tile``;
    nothing is loaded past the last one."""
    row = weight_rows(tile, features, TILE, GATED)[None, :, None, None]
    inside = (chunk < K // 16) & (tile < tiles)
    source = w_ptr + row * w_stride + (chunk * 4 + tl.arange(0, 4)[None, None, None, :])
    words = tl.load(source, mask=inside, other=0, eviction_policy="evict_first")
    source = scales_ptr + (row // HEIGHT) * scales_stride + chunk // 8
    return words, tl.load(source, mask=inside, other=0.0)


@triton.jit
def _tile_sums(words, scales, x):  # type: ignore[no-untyped-def]
    """Products of a tile with x, by 256: float32 ``[1, TILE]``. ``x`` is ``_load_x``'s."""
    # The bytes of a word become float16 in pairs that need no byte moved across: 0 and 2, 1 and 3.
    even = ((words << 8) & -0x7FFF8000) | ((words << 7) & 0x3F803F80)
    odd = (words & -0x7FFF8000) | ((words >> 1) & 0x3F803F80)
    w0, w2 = _halves(even)
    w1, w3 = _halves(odd)
    sums = tl.sum(w0 * x[0] + w1 * x[1] + w2 * x[2] + w3 * x[3], axis=3, keep_dims=True)
    return tl.sum((sums * scales).reshape(1, words.shape[1], words.shape[2]), axis=2)


@kernel(do_not_specialize=["features", "eps"])
def _fp8_gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    ids_ptr,
    features,
    w_stride,
    scales_stride,
    eps,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Grid (programs, rows of the result), any number of programs; without ``ids_ptr`` one row.
    ``w`` and ``w_stride`` are in int32 words; CHUNKS >= K / 16."""
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    if ids_ptr is not None:  # which weight it is has to be waited for
        wait_for_inputs(PDL)
        pair = tl.program_id(1).to(tl.int64)
        first_row = tl.load(ids_ptr + pair).to(tl.int64) * (features * (2 if GATED else 1))
        x_ptr += pair // SHARE * K
        y_ptr += pair * features
        w_ptr += first_row * w_stride
        scales_ptr += first_row // HEIGHT * scales_stride
    tiles = (features + OUT - 1) // OUT
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)[None, None, :, None]
    words_1, scales_1 = _load_tile(
        w_ptr, scales_ptr, tile, tiles, features, w_stride, scales_stride, chunk,
        K, HEIGHT, TILE, GATED,
    )  # fmt: skip
    if ids_ptr is None:
        wait_for_inputs(PDL)

    x0, x1, x2, x3 = _load_x(x_ptr, chunk, K)
    factor = 256.0
    if norm_ptr is not None:
        squares = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
        square = tl.sum(tl.sum(squares, axis=3).reshape(CHUNKS), axis=0)
        factor *= tl.rsqrt(square / K + eps)
        n0, n1, n2, n3 = _load_x(norm_ptr, chunk, K)
        x0, x1, x2, x3 = x0 * n0, x1 * n1, x2 * n2, x3 * n3
    x = x0, x1, x2, x3
    # Two tiles in turn: a loop that hands one tile over to the next round copies its registers, and
    # a copy waits for the load.
    for _ in range(0, tl.cdiv(tl.maximum(tiles - tile, 0), 2 * step)):
        words_2, scales_2 = _load_tile(
            w_ptr, scales_ptr, tile + step, tiles, features, w_stride, scales_stride, chunk,
            K, HEIGHT, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(words_1, scales_1, x) * factor
        finish_row(y, tile, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        words_1, scales_1 = _load_tile(
            w_ptr, scales_ptr, tile + 2 * step, tiles, features, w_stride, scales_stride, chunk,
            K, HEIGHT, TILE, GATED,
        )  # fmt: skip
        y = _tile_sums(words_2, scales_2, x) * factor
        finish_row(y, tile + step, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        tile += 2 * step


def supports(data: Tensor) -> bool:
    """Whether the kernel can read this weight."""
    return (
        data.shape[1] % 16 == 0
        and data.shape[1] <= MAX_K
        and data.stride(0) % 16 == 0
        and data.storage_offset() % 16 == 0
    )


def _kept(k: int) -> int:
    """Chunks of a row that a program keeps: a power of two, and one for each thread of a warp."""
    return max(32, next_power_of_2(k // 16))


def rule(k: int) -> Config:
    """Launch parameters where no table has the problem: a chunk of x a thread as far as possible,
    and as many programs as make 16 warps a multiprocessor."""
    warps = min(16, max(1, _kept(k) // 32))
    return {"gemv": 1, "rows": 4, "warps": warps, "programs": max(1, 16 // warps)}


def candidates(k: int) -> Iterator[Config]:
    """Launch parameters worth measuring; ``programs`` are those of a multiprocessor."""
    for warps in (2, 4, 8, 16):
        a_thread = _kept(k) // (32 * warps)
        for rows in (2, 4, 8):
            if a_thread in (1, 2, 4) and a_thread * rows <= 8:
                for programs in sorted({max(1, 16 // warps), max(1, 24 // warps)}):
                    yield {"gemv": 1, "rows": rows, "warps": warps, "programs": programs}


def gemv(
    x: Tensor,
    weight: tuple[Tensor, Tensor, int],
    epilogue: Epilogue,
    config: Config,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write ``epilogue.out`` (see the module's docstring); ``weight`` is data, scales, height."""
    data, scales, height = weight
    epilogue.check(x, data)
    assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous()), "norm"
    assert x.shape[0] == 1, f"x {x.shape}"
    assert supports(data), f"data {data.shape}"
    k, rows = data.shape[1], config["rows"]
    tiles = -(-data.shape[0] // rows)
    programs = min(tiles, config["programs"] * multiprocessors(data.device))
    pdl = dependent_launch(data.device)
    _fp8_gemv_kernel[(programs,)](
        x, norm, data.view(torch.int32), scales, epilogue.bias, epilogue.out, None,
        epilogue.features, data.stride(0) // 4, scales.stride(0), eps, k, _kept(k), height,
        epilogue.activation, epilogue.add, rows, bool(pdl), 1, num_warps=config["warps"], **pdl,
    )  # fmt: skip


def expert_gemv(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    ids: Tensor,
    activation: str,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """``out [P, F] = act(x' w[ids]^T)``: ``x [P / share, K]`` and ``out`` contiguous, ``ids`` int32
    of P elements, ``data [E, N, K]`` and ``scales [E, N / height, blocks of K]`` contiguous."""
    (pairs, features), (_, n, k) = out.shape, data.shape
    assert data.is_contiguous() and scales.is_contiguous(), "weights must be dense"  # noqa: PT018
    assert x.is_contiguous() and out.is_contiguous(), "rows must be dense"  # noqa: PT018
    assert norm is None or (norm.dtype == x.dtype == torch.float32), "norm"
    assert n == features * (1 + (activation != "none")), f"data {data.shape}, out {out.shape}"
    assert supports(data[0]), f"data {data.shape}"
    assert x.shape[1] == k and pairs % x.shape[0] == 0, f"x {x.shape}"  # noqa: PT018
    assert ids.numel() == pairs and ids.dtype == torch.int32, f"ids {ids.shape}"  # noqa: PT018
    config = rule(k)
    rows, device = config["rows"], data.device
    programs = min(-(-n // rows), -(-config["programs"] * multiprocessors(device) // pairs))
    pdl = dependent_launch(device)
    _fp8_gemv_kernel[(programs, pairs)](
        x, norm, data.view(torch.int32), scales, None, out, ids, features, k // 4,
        scales.shape[2], eps, k, _kept(k), n // scales.shape[1], activation, False, rows,
        bool(pdl), pairs // x.shape[0], num_warps=config["warps"], **pdl,
    )  # fmt: skip
