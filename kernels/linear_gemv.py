"""Products of at most four rows with a dense weight, on CUDA cores: one launch for all of

    x' = x                                        or  x / sqrt(mean(x^2) + eps) * norm
    y  = act(x' w^T + bias)                       or  stream += x' w^T + bias

``x [M, K]`` is in the weight's dtype, or float32 when it is normalised (``norm`` float32 ``[K]``);
``w [N, K]``; the epilogue is ``linear_epilogue.Epilogue``. All sums are float32. The norm's factor
is a number per row, so it is applied to the finished sum: one pass over x gives both. Until then
``x * norm`` stays float32, which can leave float16's range.

At these sizes only the weight's bytes count. A program takes a few rows of the weight and walks
along K; a thread owns whole 16-byte vectors of each row and sums in registers until the end, so
that many small programs, none of which waits for another thread, keep the memory busy. The weight
does not depend on the kernel before: with programmatic dependent launch (``pdl``; Hopper and newer)
it is on its way into the L2 cache while that kernel drains.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.linear_epilogue import Epilogue, gate, prefetch, store, weight_rows
from squall.kernels.op import multiprocessors
from squall.kernels.tuning import Config

MAX_ROWS = 4


@triton.jit
def _load_vectors(  # type: ignore[no-untyped-def]
    row_ptr, row_mask, start, K, GROUPS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr
):
    """Columns ``start`` to ``start + GROUPS * VEC`` of rows ``[R, 1, 1, 1]``, as float32
    ``[R, 1, GROUPS, VEC]``.

    A thread must get the VEC columns it has of the weight. Where these are more than 16 bytes of x
    they are loaded as two halves, each a vector load: any other split would put the exchange of x
    between threads, and a barrier, into the loop.
    """
    PART: tl.constexpr = min(VEC, 16 // (row_ptr.dtype.element_ty.primitive_bitwidth // 8))
    column = start + _columns(GROUPS, VEC, PART)
    mask = row_mask if EVEN else row_mask & (column < K)
    x = tl.load(row_ptr + column, mask=mask, other=0.0, eviction_policy="evict_last")
    if PART < VEC:
        tl.static_assert(VEC == 2 * PART)
        column += PART
        mask = row_mask if EVEN else row_mask & (column < K)
        high = tl.load(row_ptr + column, mask=mask, other=0.0, eviction_policy="evict_last")
        x = tl.join(x, high).permute(0, 1, 2, 4, 3).reshape(x.shape[0], 1, GROUPS, VEC)
    return x.to(tl.float32)


@triton.jit
def _columns(GROUPS: tl.constexpr, VEC: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first PART columns of GROUPS vectors: ``[1, 1, GROUPS, PART]``."""
    column = tl.arange(0, GROUPS)[:, None] * VEC + tl.arange(0, PART)[None, :]
    return column[None, None, :, :]


@triton.jit
def _unpack(w, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of a tile as float32; ``WORDS`` says what is in a 32-bit word, two of it."""
    if WORDS == "none":
        y = w.to(tl.float32)
    else:
        if WORDS == "bf16":
            low = (w << 16).to(tl.float32, bitcast=True)
            high = (w & -65536).to(tl.float32, bitcast=True)
        else:
            tl.static_assert(WORDS == "fp16")
            low = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        y = tl.join(low, high).reshape(1, w.shape[1], w.shape[2], 2 * w.shape[3])
    return y


@triton.jit(do_not_specialize=["rows", "features", "eps"])
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    features,
    K,
    x_stride,
    w_stride,
    y_stride,
    eps,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of TILE weight rows,). ``features`` are columns of y; ROWS >= rows.

    Unless WORDS is "none", w is int32 and ``w_stride`` counts words: vectors of 16-bit numbers cost
    twice the registers and more instructions to take apart.
    """
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    GROUPS: tl.constexpr = BLOCK_K // VEC
    tile = tl.program_id(0)
    w_row = weight_rows(tile, features, TILE, GATED)
    # Everything in the loop has these four dimensions from its load on. Adding one later would make
    # the compiler pass the data through shared memory.
    SIZE: tl.constexpr = 1 if WORDS == "none" else 2
    column = _columns(GROUPS, VEC // SIZE, VEC // SIZE)
    w_start = w_ptr + w_row * w_stride
    w_tile = w_start[None, :, None, None] + column
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch(w_start[:, None], 0, K // SIZE, 4096)
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, ROWS).to(tl.int64)
    x_row = x_ptr + (row * x_stride)[:, None, None, None]
    x_mask = (row < rows)[:, None, None, None]
    sums = tl.zeros([ROWS, TILE, GROUPS], tl.float32)
    squares = tl.zeros([ROWS, 1, GROUPS], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            w = tl.load(w_tile + k // SIZE, eviction_policy="evict_first")
        else:
            inside = column < (K - k) // SIZE
            w = tl.load(w_tile + k // SIZE, mask=inside, other=0, eviction_policy="evict_first")
        x = _load_vectors(x_row, x_mask, k, K, GROUPS, VEC, EVEN)
        if norm_ptr is not None:
            one = tl.arange(0, 1)[:, None, None, None]
            squares += tl.sum(x * x, axis=3)
            x *= _load_vectors(norm_ptr + one, one == 0, k, K, GROUPS, VEC, EVEN)
        sums += tl.sum(x * _unpack(w, WORDS), axis=3)

    y = tl.sum(sums, axis=2)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    if GATED:
        z, up = tl.split(y.reshape(ROWS, 2, OUT).permute(0, 2, 1))
        y = gate(z, up, ACTIVATION)
    feature = tile * OUT + tl.arange(0, OUT)
    target = y_ptr + row[:, None] * y_stride + feature[None, :]
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    store(target, y, mask, ADD)


def rule(features: int, k: int, gated: bool, device: torch.device) -> Config:
    """Launch parameters where no table has the problem.

    ``rows`` are weight rows of a program (both gate and up): the most that leave four programs for
    every multiprocessor. ``warps``: a tile must not be much longer than a row of the weight.
    """
    weights = features * (2 if gated else 1)
    rows = next(n for n in (8, 4, 2) if n == 2 or weights // n >= 4 * multiprocessors(device))
    warps = min(4, max(1, next_power_of_2(k) // 256))
    return {"gemv": 1, "rows": rows, "warps": warps, "pdl": 0}


def candidates(bucket: int) -> Iterator[Config]:
    """Launch parameters worth measuring for ``bucket`` rows of x."""
    tiles = [(2, 8), (4, 4), (4, 8), (8, 4), (8, 8)]
    if bucket == MAX_ROWS:  # 16 x 4 accumulators a thread do not fit beside two tiles
        tiles = [(4, 4), (4, 8), (8, 4)]
    for rows, warps in tiles:
        for pdl in (0, 1):
            yield {"gemv": 1, "rows": rows, "warps": warps, "pdl": pdl}


def gemv(
    x: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    config: Config,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write ``epilogue.out`` (see the module's docstring); ``1 <= M <= 4``."""
    epilogue.check(x, w)
    assert x.dtype == (w.dtype if norm is None else torch.float32), f"x {x.dtype}, w {w.dtype}"
    assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous()), "norm"
    assert 1 <= x.shape[0] <= MAX_ROWS, f"x {x.shape}"
    out, k = epilogue.out, w.shape[1]
    vec = 16 // w.element_size()
    block_k = 32 * config["warps"] * vec
    pdl = bool(config["pdl"])
    tile = config["rows"]
    tiles = -(-w.shape[0] // tile)
    if epilogue.gated:
        tiles = -(-epilogue.features // (tile // 2))
    words = "none"
    if w.element_size() == 2 and all(n % 2 == 0 for n in (k, w.stride(0), w.storage_offset())):
        words = "bf16" if w.dtype == torch.bfloat16 else "fp16"
        w = w.view(torch.int32)
    launch = {"launch_pdl": True} if pdl else {}
    _gemv_kernel[(tiles,)](
        x,
        norm,
        w,
        epilogue.bias,
        out,
        x.shape[0],
        epilogue.features,
        k,
        x.stride(0),
        w.stride(0),
        out.stride(0),
        eps,
        epilogue.activation,
        epilogue.add,
        next_power_of_2(x.shape[0]),
        tile,
        block_k,
        vec,
        words,
        k % block_k == 0,
        pdl,
        num_warps=config["warps"],
        **launch,
    )
