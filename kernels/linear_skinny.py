"""Products of up to 256 rows with a dense f16 or bf16 weight, on tensor cores, at memory speed.

``y = act(x w^T + bias)`` or ``stream += x w^T + bias`` for ``x [M, K]``, ``w [N, K]`` of one dtype;
the epilogue is ``linear_epilogue.Epilogue``, sums are float32. The tile is that of the transposed
result, ``[block_n weight rows, M]``: the tensor core's long side lies along the weight, and the
weight passes through shared memory exactly once, several stages ahead of the arithmetic.

Where N alone gives too few programs, ``split`` of them share a tile, each with a part of K. They
leave float32 partial sums in a workspace; the last to arrive, found by a counter, adds the parts in
their order, so results are reproducible. It also sets the counter back to zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import next_power_of_2, prefetch, tl
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import (
    Epilogue,
    finish_tile,
    is_last_part,
    sum_of_parts,
    weight_rows,
)
from squall.kernels.op import multiprocessors
from squall.kernels.tuning import Config

MAX_ROWS = 256


@kernel(do_not_specialize=["rows", "features"])
def _skinny_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    features,
    K,
    x_stride,
    w_stride,
    y_stride,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Grid (tiles, SPLIT). ``features`` are columns of y; BLOCK_M >= rows; EVEN: BLOCK_K divides K.
    With PREFETCH, the first of the weights are fetched while the kernel before still runs.

    ``partial_ptr`` float32 [tiles, SPLIT, BLOCK_N, BLOCK_M], ``counter_ptr`` int32 [tiles].
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    w_row = weight_rows(tile, features, BLOCK_N, ACTIVATION != "none")
    blocks = tl.cdiv(K, BLOCK_K)
    begin = blocks * part // SPLIT
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            prefetch(w_ptr + w_row[:, None] * w_stride, begin * BLOCK_K, K, 512)
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    w_tile = w_ptr + w_row[:, None] * w_stride + column[None, :]
    x_tile = x_ptr + row[None, :] * x_stride + column[:, None]
    x_mask = (row < rows)[None, :]
    z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(begin, blocks * (part + 1) // SPLIT):
        k = i * BLOCK_K
        if EVEN:
            w = tl.load(w_tile + k, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask=x_mask, other=0.0)
        else:
            inside = column < K - k
            w = tl.load(w_tile + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask=x_mask & inside[:, None], other=0.0)
        z = tl.dot(w, x, z)

    if SPLIT == 1:
        finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)
    else:
        parts_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
        if is_last_part(z, parts_ptr, counter_ptr + tile, part, SPLIT):
            z = sum_of_parts(parts_ptr, counter_ptr + tile, BLOCK_N, BLOCK_M, SPLIT)
            finish_tile(z, bias_ptr, y_ptr, row, rows, features, y_stride, tile, ACTIVATION, ADD)


def rule(features: int, k: int, gated: bool, device: torch.device) -> Config:
    """Launch parameters for up to 64 rows where no table has the problem: three programs a
    multiprocessor with at least 512 columns each, and 40 KiB of the weight in flight per program,
    which leaves room for three within 227 KiB (Hopper) and two within 163 KiB (A100)."""
    tiles = -(-features * (2 if gated else 1) // 64)
    wanted = 3 * multiprocessors(device) // tiles
    return _config(64, 64, max(1, min(wanted, k // 512, 8)), warps=4, stages=5)


def _config(
    block_n: int, block_k: int, split: int, warps: int, stages: int, pdl: int = 0
) -> Config:
    tile = {"block_n": block_n, "block_k": block_k, "split": split}
    # pdl 1: launched while the kernel before drains; 2: and fetches weights meanwhile
    return {"skinny": 1, **tile, "warps": warps, "stages": stages, "pdl": pdl}


def candidates(bucket: int, features: int, k: int, gated: bool) -> Iterator[Config]:
    """Launch parameters worth measuring for ``bucket`` rows of x."""
    weights = features * (2 if gated else 1)
    tiles: tuple[tuple[int, int, int, int], ...]
    if bucket <= 32:
        tiles = (
            (32, 128, 4, 5),
            (32, 256, 4, 4),
            (64, 128, 4, 4),
            (64, 128, 4, 6),
            (128, 64, 8, 6),
        )
    elif bucket <= 64:
        tiles = ((64, 64, 4, 6), (64, 128, 4, 4), (128, 64, 4, 5), (128, 64, 8, 6))
    else:
        tiles = ((64, 64, 4, 4), (128, 64, 8, 4))
    for block_n, block_k, warps, stages in tiles:
        count = -(-weights // block_n)
        steps = -(-k // block_k)
        # One, two or four programs a multiprocessor of a GPU with 132: whichever fill waves.
        splits = {max(1, min(round(n * 132 / count), steps // 2, 16)) for n in (1, 2, 4)}
        for split in sorted(splits):
            yield _config(block_n, block_k, split, warps, stages, pdl=2)
        yield _config(block_n, block_k, min(splits), warps, stages, pdl=1)


def skinny(x: Tensor, w: Tensor, epilogue: Epilogue, config: Config) -> None:
    """Write ``epilogue.out`` (see the module's docstring); ``1 <= M <= 256``."""
    epilogue.check(x, w)
    assert x.dtype == w.dtype, f"x {x.dtype}, w {w.dtype}"
    assert 1 <= x.shape[0] <= MAX_ROWS, f"x {x.shape}"
    out, k = epilogue.out, w.shape[1]
    block_m, block_n = max(8, next_power_of_2(x.shape[0])), config["block_n"]
    split, block_k, pdl = config["split"], config["block_k"], config["pdl"]
    tiles = -(-epilogue.features // (block_n // 2 if epilogue.gated else block_n))
    partial = arrivals = None
    if split > 1:
        assert tiles <= COUNT, f"{tiles} tiles in {split} parts"
        arrivals = counters(x.device)
        partial = torch.empty(tiles * split * block_n * block_m, device=x.device)
    launch = {"launch_pdl": True} if pdl else {}
    _skinny_kernel[(tiles, split)](
        x,
        w,
        epilogue.bias,
        out,
        partial,
        arrivals,
        x.shape[0],
        epilogue.features,
        k,
        x.stride(0),
        w.stride(0),
        out.stride(0),
        epilogue.activation,
        epilogue.add,
        block_m,
        block_n,
        block_k,
        split,
        k % block_k == 0,
        pdl > 0,
        pdl == 2,
        num_warps=config["warps"],
        num_stages=config["stages"],
        **launch,
    )
