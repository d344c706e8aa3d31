"""Products of dozens to hundreds of rows with a dense f16 or bf16 weight, through Hopper's TMA.

``y = act(x w^T + bias)`` or ``stream += x w^T + bias`` for ``x [M, K]``, ``w [N, K]`` of one dtype;
the epilogue is ``linear_epilogue.Epilogue``, sums are float32. A program computes ``block_m`` rows
of x times ``block_n`` rows of w, of which with an activation one half are gate rows and the other
the up rows of the same features. All that is large moves through tensor descriptors, which put
zeros where they read past an edge and write nothing there, so there are no masks. Programs with the
same rows of w are neighbours: the weight is read from memory once.

Where there are too few tiles for the GPU, ``split`` programs share one, each with a part of K. They
take turns in the order of their parts, so results are reproducible: one after the other adds its
sums to the stream, or to a workspace, which the last one turns into y. Every part is ``lag`` steps
of ``block_k`` longer than the part before, as its turn comes later. Programs wait for such of lower
numbers only, which a GPU starts first.

Descriptors ("tensor maps" in the CUDA driver API) are made for each launch and are part of its
parameters, which a CUDA graph keeps. Before Hopper, Triton turns them into pointers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import HAS_TRITON, describable, tl, triton
from squall.kernels.launch import kernel
from squall.kernels.linear_epilogue import Epilogue, gate, weight_rows
from squall.kernels.op import dependent_launch
from squall.kernels.tuning import Config

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


@kernel(do_not_specialize=["rows", "features"])
def _gemm_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    y_desc,
    partial_desc,
    turn_ptr,
    bias_ptr,
    rows,
    features,
    K,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    LAG: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Grid (tiles of rows * SPLIT * tiles of features,); ``features`` are columns of y.

    Descriptors: x [M, K], w [1 or 2, features, K], y [M, features], partial like y, float32, for
    SPLIT parts that do not ADD. ``turn_ptr`` int32, one for each tile: the part whose turn it is.
    """
    GATED: tl.constexpr = ACTIVATION != "none"
    HALF: tl.constexpr = BLOCK_N // 2
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile, group = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    part, tile = group % SPLIT, group // SPLIT
    begin = _first_step(part, tl.cdiv(K, BLOCK_K), SPLIT, LAG)
    end = _first_step(part + 1, tl.cdiv(K, BLOCK_K), SPLIT, LAG)
    w_row = weight_rows(tile, features, BLOCK_N, GATED)
    if HOPPER:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    m, n = row_tile * BLOCK_M, tile * (HALF if GATED else BLOCK_N)
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(begin, end):
        x = x_desc.load([m, i * BLOCK_K])
        w = w_desc.load([0, n, i * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
        z = tl.dot(x, w.T, z)

    if bias_ptr is not None and (SPLIT == 1 or part == 0):
        z += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    # Halves also because a whole tile in float32 does not fit into shared memory beside its stages.
    left, right = tl.split(z.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
    if SPLIT > 1:
        turn = turn_ptr + tile * row_tiles + row_tile
        while tl.atomic_add(turn, 0, sem="acquire", scope="gpu") != part:
            pass
        if HOPPER:
            _order_bulk_copies(part)
    if GATED:
        y_desc.store([m, n], gate(left, right, ACTIVATION).to(y_desc.dtype))
    elif SPLIT == 1 or ADD:
        _write(y_desc, m, n, left, right, ADD, HOPPER)
    else:
        if part > 0:
            left += partial_desc.load([m, n])
            right += partial_desc.load([m, n + HALF])
        if part < SPLIT - 1:
            _write(partial_desc, m, n, left, right, ADD, HOPPER)
        else:
            _write(y_desc, m, n, left, right, ADD, HOPPER)
    if SPLIT > 1:
        if HOPPER:
            _order_bulk_copies(part)
        tl.debug_barrier()  # all threads' sums are written before one thread says so
        tl.atomic_xchg(turn, (part + 1) % SPLIT, sem="release", scope="gpu")


@triton.jit
def _first_step(part, steps, SPLIT: tl.constexpr, LAG: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first step of ``part`` when each part has LAG more of them than the part before."""
    return max(steps * part // SPLIT - LAG * part * (SPLIT - part) // 2, 0)


@triton.jit
def _write(y_desc, m, n, left, right, ADD: tl.constexpr, HOPPER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store both halves of a float32 tile at row m and column n, or add them to what is there."""
    middle = n + left.shape[1]
    if not ADD:
        y_desc.store([m, n], left.to(y_desc.dtype))
        y_desc.store([m, middle], right.to(y_desc.dtype))
    elif HOPPER:  # by the TMA: no program waits for what was there
        y_desc.atomic_add([m, n], left)
        y_desc.atomic_add([m, middle], right)
    else:
        y_desc.store([m, n], y_desc.load([m, n]) + left)
        y_desc.store([m, middle], y_desc.load([m, middle]) + right)


@triton.jit
def _order_bulk_copies(anything):  # type: ignore[no-untyped-def]
    """Wait until this thread's stores through descriptors are in memory (Triton waits until they
    have been read), and let none of its loads through descriptors pass what it has waited for."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.u32 $0, $1;",
        "=r,r",
        [anything],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def candidates(bucket: int, features: int, k: int, gated: bool) -> Iterator[Config]:
    """Launch parameters worth measuring on Hopper for ``bucket`` rows of x; none below 64.

    There are as many parts as fill 132 multiprocessors with one program each, or with all they have
    room for. A turn takes about as long as three steps.
    """
    if bucket < 64 or features % 8 or k % 8:
        return
    tiles: tuple[tuple[int, int, int, int, int, int], ...]
    if bucket <= 64:
        tiles = ((64, 256, 64, 4, 4, 1), (64, 128, 128, 4, 4, 1), (64, 128, 64, 4, 4, 2))
    elif bucket <= 128:
        tiles = ((128, 256, 64, 8, 4, 1), (128, 128, 128, 8, 3, 1), (128, 128, 64, 4, 3, 2))
    else:
        tiles = ((256, 128, 64, 8, 4, 1), (128, 256, 64, 8, 4, 1), (128, 128, 64, 4, 3, 2))
    for block_m, block_n, block_k, warps, stages, room in tiles:
        count = -(-bucket // block_m) * -(-features * (1 + gated) // block_n)
        steps = -(-k // block_k)
        most = 1 if gated else max(1, steps // 8)
        for split in sorted({max(1, min(n * 132 // count, most)) for n in (1, room)}):
            for lag in sorted({0, min(3, steps // split**2) if split > 1 else 0}):
                tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
                way = {"split": split, "lag": lag, "warps": warps, "stages": stages}
                yield {"gemm": 1, **tile, **way}


def supports(w: Tensor, gated: bool, split: int) -> bool:
    """Whether ``w [N, K]`` can be multiplied with in ``split`` parts.

    Descriptors want rows of w and of the result to begin at multiples of 16 bytes, and gate and up
    must be complete before they are multiplied.
    """
    features = w.shape[0] // (1 + gated)
    return features % 8 == 0 and describable(w) and not (gated and split > 1)


def gemm(x: Tensor, w: Tensor, epilogue: Epilogue, config: Config) -> None:
    """Write ``epilogue.out`` (see the module's docstring); ``M >= 1``. ``supports`` says which w.

    Rows of x may lie anywhere: x is copied where no descriptor can describe it.
    """
    epilogue.check(x, w)
    out, features, gated = epilogue.out, epilogue.features, epilogue.gated
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    split, half = config["split"], block_n // 2
    assert x.dtype == w.dtype, f"x {x.dtype}, w {w.dtype}"
    assert supports(w, gated, split), f"w {w.shape}, rows {w.stride(0)} apart, in {split} parts"
    assert describable(out), f"rows of out are {out.stride(0)} elements apart"
    if not describable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tiles = -(-x.shape[0] // block_m) * -(-features // (half if gated else block_n))
    partial = turns = None
    if split > 1:
        assert tiles <= COUNT, f"{tiles} tiles in {split} parts"
        turns = counters(x.device)
        if not epilogue.add:
            partial = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            partial = TensorDescriptor.from_tensor(partial, [block_m, half])
    weight = w.view(1 + gated, features, w.shape[1])
    launch = dependent_launch(x.device)
    _gemm_kernel[(tiles * split,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [1 + gated, block_n // (1 + gated), block_k]),
        TensorDescriptor.from_tensor(out, [block_m, half]),
        partial,
        turns,
        epilogue.bias,
        x.shape[0],
        features,
        w.shape[1],
        epilogue.activation,
        epilogue.add,
        block_m,
        block_n,
        block_k,
        split,
        config["lag"],
        bool(launch),
        num_warps=config["warps"],
        num_stages=config["stages"],
        **launch,
    )
