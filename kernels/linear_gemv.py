"""Products of one row with a dense 16-bit weight: one launch for all of

    x' = x                              or  x / sqrt(mean(x^2) + eps) * norm
    y  = act(x' w^T + bias)             or  stream += x' w^T + bias

``x [1, K]`` is in the weight's dtype, or float32 when it is normalised (``norm`` float32 ``[K]``);
``w [N, K]``, K a multiple of 8 and at most 32,768, rows aligned to 16 bytes; the epilogue is
``linear_epilogue.Epilogue``. All sums are float32. x' is not rounded before it is multiplied.

With experts, ``w`` is ``[E, N, K]`` and a row of the result is the product of a row of x with the
expert that ``ids`` (int32 ``[P]``) names: row ``i`` of ``[P, F]`` takes row ``i // share`` of x.

Only the weight's bytes count here, so nothing else may be read often: as many programs as the GPU
holds at once keep all of x in registers and walk over the rows of the weight, a tile of rows in
flight while the one before is summed. The norm's factor is applied to the finished sum, so x and
its square are read in one go. The weight does not depend on the kernel before: with programmatic
dependent launch (``pdl``; Hopper and newer) a program's first tile is already being loaded while
that kernel drains. (Fetching the tiles behind it into the L2 cache too made small products twice as
slow: measured on an H100.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import Epilogue, finish_row, weight_rows
from squall.kernels.op import dependent_launch, multiprocessors
from squall.kernels.tuning import Config

MAX_K = 32768


@triton.jit
def _product(w, even, odd, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row sums [1, R] of a tile ``w`` int32 [R, WORDS], two weights a word, times x."""
    if BF16:
        low = (w << 16).to(tl.float32, bitcast=True)
        high = (w & -65536).to(tl.float32, bitcast=True)
    else:
        low = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.sum(low * even[None, :] + high * odd[None, :], axis=1)[None, :]


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    w_ptr,
    tile,
    tiles,
    features,
    w_stride,
    word,
    inside,
    TILE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Tile number ``tile`` of the weight; nothing is loaded past the last one."""
    row = weight_rows(tile, features, TILE, GATED)
    source = w_ptr + row[:, None] * w_stride + word[None, :]
    mask = inside[None, :] & (tile < tiles)
    return tl.load(source, mask=mask, other=0, eviction_policy="evict_first")


@kernel(do_not_specialize=["features", "eps"])
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    ids_ptr,
    features,
    w_stride,
    eps,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BF16: tl.constexpr,
    PDL: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Grid (programs, rows of the result), any number of programs; without ``ids_ptr`` one row.
    ``w`` and ``w_stride`` are in int32 words; WORDS >= K / 2."""
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    if ids_ptr is not None:  # which weight it is has to be waited for
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        pair = tl.program_id(1).to(tl.int64)
        first_row = tl.load(ids_ptr + pair).to(tl.int64) * (features * (2 if GATED else 1))
        x_ptr += pair // SHARE * K
        y_ptr += pair * features
        w_ptr += first_row * w_stride
        if bias_ptr is not None:
            bias_ptr += first_row
    tiles = (features + OUT - 1) // OUT
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    word = tl.arange(0, WORDS)
    inside = word < K // 2
    first = _load_rows(w_ptr, tile, tiles, features, w_stride, word, inside, TILE, GATED)
    if PDL and ids_ptr is None:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    even = tl.load(x_ptr + 2 * word, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + 2 * word + 1, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(even * even + odd * odd, axis=0) / K + eps)
        even *= tl.load(norm_ptr + 2 * word, mask=inside, other=0.0)
        odd *= tl.load(norm_ptr + 2 * word + 1, mask=inside, other=0.0)
    # Two tiles in turn: a loop that hands one tile over to the next round copies its registers, and
    # a copy waits for the load.
    for _ in range(0, tl.cdiv(tl.maximum(tiles - tile, 0), 2 * step)):
        second = _load_rows(
            w_ptr, tile + step, tiles, features, w_stride, word, inside, TILE, GATED
        )
        y = _product(first, even, odd, BF16) * factor
        finish_row(y, tile, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        first = _load_rows(
            w_ptr, tile + 2 * step, tiles, features, w_stride, word, inside, TILE, GATED
        )
        y = _product(second, even, odd, BF16) * factor
        finish_row(y, tile + step, tiles, features, bias_ptr, y_ptr, ACTIVATION, ADD)
        tile += 2 * step


def supports(w: Tensor) -> bool:
    """Whether the kernel can read this weight."""
    return (
        w.element_size() == 2
        and w.shape[1] % 8 == 0
        and w.shape[1] <= MAX_K
        and w.stride(0) % 8 == 0
        and w.storage_offset() % 8 == 0
    )


def rule(k: int) -> Config:
    """Launch parameters where no table has the problem: 16 to 32 words of x a thread."""
    words = next_power_of_2(k // 2)
    warps = min(16, max(1, words // 512))
    return {"gemv": 1, "rows": 2, "warps": warps, "programs": max(1, 16 // warps), "pdl": 0}


def candidates(k: int, gated: bool) -> Iterator[Config]:
    """Launch parameters worth measuring; ``programs`` are those of a multiprocessor."""
    words = next_power_of_2(k // 2)
    for warps in (4, 8, 16):
        a_thread = words // (32 * warps)
        for rows in (2, 4) if gated or a_thread < 32 else (1, 2):
            registers = 32 * warps * (a_thread * (2 + rows) * 1.2 + 16)  # as compiled for sm_90
            for programs in (1, 2, 4, 6):
                if a_thread < 8 or programs * registers > 65536 or programs * warps < 8:
                    continue
                head = {"gemv": 1, "rows": rows, "warps": warps, "programs": programs}
                yield {**head, "pdl": 1}
                if programs * warps == 16 and rows == 2:
                    yield {**head, "pdl": 0}


def gemv(
    x: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    config: Config,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write ``epilogue.out`` (see the module's docstring)."""
    epilogue.check(x, w)
    assert x.dtype == (w.dtype if norm is None else torch.float32), f"x {x.dtype}, w {w.dtype}"
    assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous()), "norm"
    assert x.shape[0] == 1, f"x {x.shape}"
    assert supports(w), f"w {w.dtype} {w.shape}"
    out, k, rows = epilogue.out, w.shape[1], config["rows"]
    tiles = -(-w.shape[0] // rows)
    pdl = bool(config["pdl"])
    launch = {"launch_pdl": True} if pdl else {}
    programs = min(tiles, config["programs"] * multiprocessors(w.device))
    _gemv_kernel[(programs,)](
        x, norm, w.view(torch.int32), epilogue.bias, out, None, epilogue.features,
        w.stride(0) // 2, eps, k, next_power_of_2(k // 2), epilogue.activation, epilogue.add, rows,
        w.dtype == torch.bfloat16, pdl, 1, num_warps=config["warps"], **launch,
    )  # fmt: skip


def expert_gemv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    activation: str,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """``out [P, F] = act(x' w[ids]^T + bias[ids])``: ``x [P / share, K]`` and ``out`` contiguous,
    ``bias [E, N]``, ``ids`` int32 of P elements, ``w [E, N, K]`` contiguous."""
    (pairs, features), k = out.shape, w.shape[2]
    gated = activation != "none"
    assert x.dtype == (w.dtype if norm is None else torch.float32), f"x {x.dtype}, w {w.dtype}"
    assert w.is_contiguous() and x.is_contiguous() and out.is_contiguous(), "rows"  # noqa: PT018
    assert supports(w[0]) and w.shape[1] == features * (1 + gated), f"w {w.shape}"  # noqa: PT018
    assert x.shape[1] == k and pairs % x.shape[0] == 0, f"x {x.shape}"  # noqa: PT018
    assert ids.numel() == pairs and ids.dtype == torch.int32, f"ids {ids.shape}"  # noqa: PT018
    rows, warps = 4, min(16, max(1, next_power_of_2(k // 2) // 256))
    tiles = -(-w.shape[1] // rows)
    programs = min(tiles, -(-max(1, 32 // warps) * multiprocessors(w.device) // pairs))
    launch = dependent_launch(w.device)
    _gemv_kernel[(programs, pairs)](
        x, norm, w.view(torch.int32), bias, out, ids, features, k // 2, eps, k,
        next_power_of_2(k // 2), activation, False, rows, w.dtype == torch.bfloat16,
        bool(launch), pairs // x.shape[0], num_warps=warps, **launch,
    )  # fmt: skip
