"""Products of up to 256 rows with a weight in planes, on tensor cores.

    out    = act(x W^T + bias)       plane_gemm
    out    = [x V^T, x W^T] + bias   plane_gemm_pair
    stream += x W^T + bias           plane_gemm_add

``x [M, K]`` is float16 or bfloat16, its rows may be strided; W (and V) ``[N, K]`` in the planes
``low, high, scales, supers`` of ``ggml_type`` (:mod:`squall.kernels.quant.planes`); ``bias`` is
``[N]`` or None; ``out`` float16, bfloat16 or float32, ``[M, F]``, its rows may be strided;
``stream`` float32 ``[M, N]``, likewise. ``activation`` is "none" (F = N), or "silu" or "gelu_tanh":
W is then ``[2F, K]``, gate rows before up rows, and the result ``act(gate) * up``.

Weights and their scales are rounded to 11 bits, and weights then to x's dtype
(:mod:`squall.kernels.quant.gemm_dequant`); sums are float32.

Where N alone gives too few programs, ``split`` of them share a tile, each with a part of K. They
leave float32 partial sums in a workspace; the last to arrive, found by a counter, adds the parts in
their order, so results are reproducible. It also sets the counter back to zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, Case, random
from squall.kernels.counters import COUNT, counters
from squall.kernels.lang import TensorDescriptor, describable, next_power_of_2
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors, op
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.gemm_dequant import GAIN
from squall.kernels.quant.gemm_kernel import plane_gemm_kernel
from squall.kernels.quant.planes import (
    SUPER,
    Layout,
    Planes,
    Tensors,
    dequantize,
    layout,
    padded,
    random_planes,
    tuning_key,
)
from squall.kernels.tuning import Config, tuned

MAX_ROWS = 256


def _product(
    x: Tensor, planes: Tensors, ggml_type: int, bias: Tensor | None, activation: str
) -> Tensor:
    weight = dequantize(Planes(gguf_formats()[ggml_type], x.shape[1], *planes))
    y = F.linear(x.float(), weight, None if bias is None else bias.float())
    return ACTIVATIONS[activation](y)


def plane_gemm_reference(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    out.copy_(_product(x, (low, high, scales, supers), ggml_type, bias, activation))


def plane_gemm_pair_reference(
    x: Tensor,
    first: list[Tensor | None],
    first_type: int,
    second: list[Tensor | None],
    second_type: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    left, right = Epilogue(out, bias).split_at(cast(Tensors, first)[0].shape[0])
    for planes, kind, side in ((first, first_type, left), (second, second_type, right)):
        tensors = cast(Tensors, planes)
        plane_gemm_reference(x, *tensors, kind, side.bias, "none", side.out)


def plane_gemm_add_reference(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    stream += _product(x, (low, high, scales, supers), ggml_type, bias, "none")


def launch_config(
    plan: Layout, tile: tuple[int, int, int], split: int, warps: int, budget: int = 80
) -> Config:
    """``tile`` is BLOCK_M, BLOCK_N, BLOCK_K; as many stages as ``budget`` KiB of shared memory
    hold, 2 to 5. ``registers`` a thread may use follow from its sums and its weights, two a
    register: with 128 there are four programs of four warps a multiprocessor, with 168 three."""
    block_m, block_n, block_k = tile
    # Blocks take words of a plane whole: 128 weights of 2 bits, 256 of 1 bit.
    block_k = max(block_k, 256 if plan.high_bits == 1 else 128 if plan.low_bits == 2 else 64)
    if plan.high_bits == 2 or plan.scales == "power":  # four scales a word
        block_k = max(block_k, 128)
    stage = block_k * (block_m * 16 + block_n * (plan.low_bits + plan.high_bits + 1)) // 8
    kept = (block_m + block_k // 2) * block_n // (32 * warps)
    return {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "split": split,
        "warps": warps,
        "stages": max(2, min(5, budget * 1024 // stage)),
        "registers": 128 if kept <= 80 else 168 if kept <= 104 else 255,
    }


def _tiles(bucket: int, weights: int, tile: tuple[int, int, int]) -> int:
    return -(-weights // tile[1]) * -(-bucket // tile[0])


def rule(plan: Layout, bucket: int, weights: int, k: int, device: torch.device) -> Config:
    """Launch parameters where no table has the problem: for few rows four programs a
    multiprocessor, for more two, with at least 512 columns of the ``weights`` rows each. Four warps
    waste fewer instructions than eight, but 128 rows of x leave them too few registers."""
    tile, programs = ((bucket, 64, 256), 4) if bucket <= 32 else ((min(bucket, 128), 128, 128), 2)
    wanted = programs * multiprocessors(device) // _tiles(bucket, weights, tile)
    return launch_config(plan, tile, max(1, min(wanted, k // 512, 8)), 4 if bucket <= 64 else 8)


def candidates(plan: Layout, bucket: int, weights: int, k: int) -> Sequence[Config]:
    """At most 16 launch parameters worth measuring."""
    m, found = min(bucket, 128), []
    if bucket <= 32:
        shapes = [((m, 128, 128), 4), ((m, 64, 256), 4), ((m, 128, 256), 8), ((m, 64, 128), 4)]
    elif bucket == 64:
        shapes = [((m, 128, 128), 4), ((m, 64, 256), 4), ((m, 128, 128), 8), ((m, 64, 128), 4)]
    else:
        shapes = [((m, 128, 64), 8), ((m, 128, 128), 8), ((m, 64, 128), 4), ((64, 128, 128), 4)]
    for tile, warps in shapes:
        tiles = _tiles(bucket, weights, tile)
        # One to four programs a multiprocessor of a GPU with 132.
        splits = {max(1, min(round(n * 132 / tiles), k // 512, 16)) for n in (1, 2, 3, 4)}
        for split in sorted(splits):
            config = launch_config(plan, tile, split, warps, 100 if warps == 8 else 70)
            if config not in found:  # blocks of some formats are longer than asked for
                found.append(config)
    return found


def as_words(scales: Tensor) -> Tensor:
    """Scales as a flat row of int32; an odd float16 at the end gets a neighbour."""
    flat = scales.view(-1)
    if flat.nbytes % 4:
        flat = F.pad(flat, (0, 1))
    return flat.view(torch.int32)


def described(plane: Tensor, bits: int, features: int, tile: tuple[int, int, int]) -> Any:
    """A plane for :mod:`squall.kernels.quant.gemm_kernel`, as matrices of ``features`` rows;
    ``tile`` is matrices, rows of each, columns."""
    matrices, block_n, block_k = tile
    words = plane.view(torch.int16)
    n, width = words.shape
    shape, strides = [n // features, features, width], [features * width, width, 1]
    return TensorDescriptor(words, shape, strides, [matrices, block_n, block_k * bits // 16])


def _check(x: Tensor, low: Tensor, plan: Layout, epilogue: Epilogue) -> None:
    (rows, k), out = x.shape, epilogue.out
    width = padded(k) * plan.low_bits // 32
    assert x.dtype in (torch.float16, torch.bfloat16), f"x {x.dtype}"
    assert rows <= MAX_ROWS, f"{rows} rows; at most {MAX_ROWS} are supported"
    assert out.shape[0] == rows, f"x {x.shape}, out {out.shape}"
    weights = epilogue.features * (1 + epilogue.gated)
    assert low.shape == (weights, width), f"x {x.shape}, low {low.shape}, out {out.shape}"
    assert epilogue.bias is None or epilogue.bias.shape == (weights,), f"bias for {weights} rows"
    assert x.stride(1) == out.stride(1) == 1, "rows must be dense"


def gemm(
    x: Tensor,
    planes: Tensors,
    ggml_type: int,
    epilogue: Epilogue,
    config: Config | None = None,
    order: str = "alone",
) -> Tensor | None:
    """Launch; ``config`` overrides the table (tuning), ``order`` as in ``wait_in_order``. Returns
    the workspace: the "second" kernel must not get that of the "first"."""
    (low, high, scales, supers), plan = planes, layout(ggml_type)
    _check(x, low, plan, epilogue)
    (rows, k), n = x.shape, low.shape[0]
    if rows == 0:
        return None
    bucket, width = max(16, next_power_of_2(rows)), padded(k)
    config = config or tuned("plane_gemm", tuning_key(ggml_type, n, width, bucket), x.device)
    config = config or rule(plan, bucket, n, width, x.device)
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    per_tile = block_n // 2 if epilogue.gated else block_n
    jobs = -(-epilogue.features // per_tile) * -(-rows // block_m)
    split, partial, arrivals = config["split"], None, None
    if split > 1:
        assert jobs <= COUNT // 2, f"{jobs} tiles in {split} parts"
        arrivals = counters(x.device)[COUNT // 2 if order == "second" else 0 :]
        partial = torch.empty(jobs * split * block_n * block_m, device=x.device)
    pdl, ptx = dependent_launch(x.device), has_ptx(x.device)
    limit = {"maxnreg": config["registers"]} if ptx else {}
    gates = 1 + epilogue.gated
    if not describable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tile = gates, block_n // gates, block_k
    sizes = (rows, epilogue.features, k, width // SUPER, epilogue.out.stride(0))
    numbers = (plan.low_bits, plan.high_bits, plan.offset, plan.group, plan.scales, plan.paired)
    plane_gemm_kernel[(jobs, split)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        described(low, plan.low_bits, epilogue.features, tile),
        None if high is None else described(high, plan.high_bits, epilogue.features, tile),
        as_words(scales),
        None if supers is None else as_words(supers),
        epilogue.bias,
        epilogue.out,
        partial,
        arrivals,
        *sizes,
        *numbers,
        GAIN,
        epilogue.activation,
        epilogue.add,
        block_m,
        block_n,
        block_k,
        split,
        ptx,
        bool(pdl),
        order,
        num_warps=config["warps"],
        num_stages=config["stages"],
        **pdl,
        **limit,
    )
    return partial


def plane_gemm_launcher(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    assert activation in ACTIVATIONS, activation
    gemm(x, (low, high, scales, supers), ggml_type, Epilogue(out, bias, activation))


def plane_gemm_pair_launcher(
    x: Tensor,
    first: list[Tensor | None],
    first_type: int,
    second: list[Tensor | None],
    second_type: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    if not describable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    left, right = Epilogue(out, bias).split_at(cast(Tensors, first)[0].shape[0])
    kept = gemm(x, cast(Tensors, first), first_type, left, order="first")
    gemm(x, cast(Tensors, second), second_type, right, order="second")
    del kept


def plane_gemm_add_launcher(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    gemm(x, (low, high, scales, supers), ggml_type, Epilogue(stream, bias, add=True))


def _fake(*_arguments: object) -> None:
    return None


_INPUTS = (
    "Tensor x, Tensor low, Tensor? high, Tensor scales, Tensor? supers, int ggml_type, Tensor? bias"
)
plane_gemm = op(
    f"plane_gemm({_INPUTS}, str activation, Tensor(a!) out) -> ()",
    plane_gemm_reference,
    plane_gemm_launcher,
    _fake,
)
plane_gemm_pair = op(
    "plane_gemm_pair(Tensor x, Tensor?[] first, int first_type, Tensor?[] second, int second_type,"
    " Tensor? bias, Tensor(a!) out) -> ()",
    plane_gemm_pair_reference,
    plane_gemm_pair_launcher,
    _fake,
)
plane_gemm_add = op(
    f"plane_gemm_add({_INPUTS}, Tensor(a!) stream) -> ()",
    plane_gemm_add_reference,
    plane_gemm_add_launcher,
    _fake,
)

_TYPES = {entry.name: entry for entry in gguf_formats().values() if entry.unpack is not None}
_HALF = (torch.float16, torch.bfloat16)


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    moved = (None if t is None else t.to(device) for t in tensors)
    return cast(Tensors, tuple(moved))


def _inputs(
    name: str, size: tuple[int, int, int], bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    """Arguments up to ``bias`` for M, N, K; x is float16 where results are float32."""
    m, n, k = size
    entry, cpu = _TYPES[name], torch.device("cpu")
    planes = random_planes(entry, n, k, cpu, torch.Generator().manual_seed(51))
    x = random((m, k + 16), dtype if dtype in _HALF else torch.float16, device, 52)[:, :k]
    return (
        x,
        *_moved(planes.tensors, device),
        entry.ggml_type,
        random((n,), dtype, device, 53) if bias else None,
    )


def _case(
    name: str,
    size: tuple[int, int, int],
    activation: str = "none",
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
    shifted: bool = False,
) -> Case:
    """``shifted``: x is dense, but does not begin at a multiple of 16 bytes."""

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        features = size[1] // (1 if activation == "none" else 2)
        # Weights are rounded to 11 bits: results are no better than float16's limit.
        kept = dtype if dtype in _HALF else torch.float16
        out = torch.full((size[0], features + 3), torch.nan, dtype=kept, device=device)[:, 3:]
        x, *rest = _inputs(name, size, bias, dtype, device)
        if shifted:
            x = F.pad(x.flatten(), (1, 0))[1:].view(x.shape)
        return x, *rest, activation, out

    title = f"plane_gemm-{name}-{'x'.join(map(str, size))}-{activation}{'-bias' * bias}"
    title += "-shifted" * shifted
    fns = plane_gemm, plane_gemm_reference, plane_gemm_launcher
    return Case(title, *fns, build, mutates=(8,), interpret=size[2] <= 1024, aot=aot)


def _add_case(name: str, size: tuple[int, int, int], bias: bool = False) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        # Large, so that float32's limit is about that of x's dtype for the product.
        scale = 1024 if dtype == torch.bfloat16 else 128
        stream = random((size[0], size[1] + 4), torch.float32, device, 54)[:, 4:] * scale
        return *_inputs(name, size, bias, dtype, device), stream

    title = f"plane_gemm_add-{name}-{'x'.join(map(str, size))}{'-bias' * bias}"
    fns = plane_gemm_add, plane_gemm_add_reference, plane_gemm_add_launcher
    aot = (torch.float16,) if size[2] > 512 else ()
    return Case(title, *fns, build, mutates=(7,), interpret=size[2] <= 1024, aot=aot)


def _pair_case(names: tuple[str, str], size: tuple[int, int, int], bias: bool = False) -> Case:
    """N of the first weight, of which the second has half."""
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x, *first, first_type, _ = _inputs(names[0], size, False, dtype, device)
        _, *second, second_type, _ = _inputs(names[1], (m, n // 2, k), False, dtype, device)
        total = n + n // 2
        out = torch.full((m, total + 3), torch.nan, dtype=x.dtype, device=device)[:, 3:]
        some_bias = random((total,), dtype, device, 55) if bias else None
        return x, first, first_type, second, second_type, some_bias, out

    title = f"plane_gemm_pair-{'-'.join(names)}-{'x'.join(map(str, size))}{'-bias' * bias}"
    fns = plane_gemm_pair, plane_gemm_pair_reference, plane_gemm_pair_launcher
    aot = (torch.float16,) if bias else ()
    return Case(title, *fns, build, mutates=(6,), interpret=k <= 1024, aot=aot)


def _cases() -> Iterator[Case]:
    f16 = (torch.float16,)
    yield _pair_case(("Q4_K", "Q6_K"), (8, 130, 512), bias=True)
    yield _pair_case(("Q8_0", "Q5_0"), (33, 6, 288))
    yield _pair_case(("Q4_K", "Q6_K"), (100, 2048, 4096))
    for name, entry in _TYPES.items():
        yield _case(name, (17, 70, 1024), aot=f16)
        yield _case(name, (9, 37, 768), bias=True)
        if entry.block_size == 32:
            yield _case(name, (20, 5, 288))
    for name in ("Q4_K", "Q6_K"):
        yield _case(name, (16, 128, 512), aot=BF16)
        yield _case(name, (50, 33, 512), aot=f16)
        yield _case(name, (3, 33, 256), shifted=True)
        yield _case(name, (128, 130, 256), aot=f16)
        yield _case(name, (200, 40, 512), bias=True)
        yield _case(name, (100, 300, 4096))
    for activation in ("silu", "gelu_tanh"):
        yield _case("Q4_K", (31, 74, 1024), activation, aot=f16)
        yield _case("Q6_K", (70, 134, 768), activation, bias=True)
    for name, size in (("Q4_K", (32, 130, 1024)), ("Q6_K", (70, 65, 512)), ("Q8_0", (9, 7, 288))):
        yield _add_case(name, size, bias=name == "Q8_0")


CASES = tuple(_cases())
