"""Products of one row with quantised weights, by four-way byte products (dp4a):

    out = act(x W^T + bias)         plane_gemv
    stream += x W^T + bias          plane_gemv_add

x comes as ``parts int8 [2, M, KP]``, ``scale float32 [M, KP / 32]`` and ``sums int32 [M, KP / 16]``
(:mod:`squall.kernels.quant.activations`), W ``[N, K]`` in planes
(:mod:`squall.kernels.quant.planes`). ``out`` is ``[M, N]`` of any float dtype, ``stream`` float32
``[M, N]``; rows may be strided. With ``activation`` "silu" or "gelu_tanh" W is ``[2F, K]``, gate
rows then up rows, and ``out [M, F]`` is ``act(gate) * up``. ``bias`` is ``[N]`` or None.

Up to eight rows are possible, each of which reads all weights: this is for one row, and for few
rows of float32 models, which have no other fused product.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors, op
from squall.kernels.quant.activations import quantize_rows, quantize_rows_reference, restore
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.gemv_kernel import plane_gemv_kernel
from squall.kernels.quant.planes import (
    Planes,
    dequantize,
    layout,
    padded,
    random_planes,
    tuning_key,
)
from squall.kernels.tuning import Config, Problem, Tunable, tuned

MAX_ROWS = 8


def _matrix(
    low: Tensor, high: Tensor | None, scales: Tensor, supers: Tensor | None, ggml_type: int
) -> Tensor:
    """float32 ``[N, KP]``."""
    in_features = low.shape[1] * 32 // layout(ggml_type).low_bits
    return dequantize(Planes(gguf_formats()[ggml_type], in_features, low, high, scales, supers))


def plane_gemv_reference(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    weights = _matrix(low, high, scales, supers, ggml_type)
    y = F.linear(restore((parts, scale, sums)), weights, None if bias is None else bias.float())
    out.copy_(ACTIVATIONS[activation](y))


def plane_gemv_add_reference(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    weights = _matrix(low, high, scales, supers, ggml_type)
    stream += F.linear(restore((parts, scale, sums)), weights, bias)


def _kept(chunks: int) -> int:
    """Chunks of a row that a program keeps: a power of two. With fewer than 16, tiles of two rows
    would leave a thread less than the four words that are multiplied at a time."""
    return max(16, next_power_of_2(chunks))


def rule(chunks: int) -> Config:
    """Launch parameters where no table has the problem: one chunk of x a thread as long as there
    are 16 warps for it, and as many programs as make 16 warps a multiprocessor.

    ``rows`` are weight rows of a tile (gate and up together).
    """
    warps = min(16, max(1, _kept(chunks) // 32))
    return {"rows": 2, "warps": warps, "programs": max(1, 16 // warps)}


def candidates(chunks: int) -> Iterator[Config]:
    """Launch parameters worth measuring. A warp alone needs no barrier, but many registers."""
    for warps in (1, 2, 4, 8, 16):
        a_thread = _kept(chunks) // (32 * warps)
        for rows in (2, 4, 8):
            if a_thread in (1, 2, 4) and a_thread * rows <= 8:
                held = (8, 10, 12) if warps == 1 else (max(1, 16 // warps), max(1, 24 // warps))
                for programs in sorted(set(held)):
                    yield {"rows": rows, "warps": warps, "programs": programs}


def _as_words(scales: Tensor, bits: int) -> Tensor:
    """Scales as the kernel loads them: ``[N, words]`` of 16 or 32 bits."""
    return scales.view(scales.shape[0], -1).view(torch.int16 if bits == 16 else torch.int32)


def _gemv(
    quantized: tuple[Tensor, Tensor, Tensor],
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    add: bool = False,
    config: Config | None = None,
) -> None:
    """Launch; ``config`` overrides the table (tuning)."""
    (parts, scale, sums), (low, high, scales, supers) = quantized, planes
    plan, gated = layout(ggml_type), activation != "none"
    (rows, features), (n, width) = out.shape, low.shape
    k = width * 32 // plan.low_bits
    assert parts.shape == (2, rows, k), f"parts {parts.shape} for {rows} rows of {k}"
    assert rows <= MAX_ROWS, f"{rows} rows; at most {MAX_ROWS} are supported"
    assert n == features * (1 + gated), f"{n} weight rows for out {out.shape}, {activation}"
    assert activation in ACTIVATIONS, activation
    assert bias is None or bias.shape == (n,), f"bias {bias.shape} for {n} rows"
    assert out.stride(1) == 1, "rows of out must be dense"
    if rows == 0:
        return
    chunks = width // 4
    config = config or tuned("plane_gemv", tuning_key(ggml_type, n, k, 1), low.device)
    config = config or rule(chunks)
    tile = config["rows"]
    tiles = -(-features // (tile // 2 if gated else tile))
    programs = min(tiles, config["programs"] * multiprocessors(low.device))
    pdl = dependent_launch(low.device)
    plane_gemv_kernel[(programs, rows)](
        parts.view(torch.int32),
        scale,
        sums,
        low,
        high,
        _as_words(scales, 16 if plan.low_bits == 8 else 32),
        None if supers is None else _as_words(supers, 32 if plan.paired else 16),
        bias,
        out,
        features,
        out.stride(0),
        k // 256,
        _kept(chunks),
        plan.low_bits,
        plan.high_bits,
        plan.offset,
        plan.group,
        plan.scales,
        activation,
        add,
        tile,
        has_ptx(low.device),
        bool(pdl),
        num_warps=config["warps"],
        **pdl,
    )


def plane_gemv_launcher(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    planes = (low, high, scales, supers)
    _gemv((parts, scale, sums), planes, ggml_type, bias, activation, out)


def plane_gemv_add_launcher(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    planes = (low, high, scales, supers)
    _gemv((parts, scale, sums), planes, ggml_type, bias, "none", stream, add=True)


def _fake(*_arguments: object) -> None:
    return None


_INPUTS = (
    "Tensor parts, Tensor scale, Tensor sums, Tensor low, Tensor? high, Tensor scales,"
    " Tensor? supers, int ggml_type, Tensor? bias"
)
plane_gemv = op(
    f"plane_gemv({_INPUTS}, str activation, Tensor(a!) out) -> ()",
    plane_gemv_reference,
    plane_gemv_launcher,
    _fake,
)
plane_gemv_add = op(
    f"plane_gemv_add({_INPUTS}, Tensor(a!) stream) -> ()",
    plane_gemv_add_reference,
    plane_gemv_add_launcher,
    _fake,
)

_TYPES = {entry.name: entry for entry in gguf_formats().values() if entry.unpack is not None}


def _inputs(
    name: str, size: tuple[int, int, int], bias: bool, device: torch.device
) -> tuple[object, ...]:
    """Arguments up to ``bias`` for M, N, K."""
    m, n, k = size
    entry, cpu = _TYPES[name], torch.device("cpu")
    planes = random_planes(entry, n, k, cpu, torch.Generator().manual_seed(41))
    x = random((m, k), torch.float32, cpu, 42)
    tensors = (*quantize_rows_reference(x, padded(k)), *planes.tensors)
    moved = [None if t is None else t.to(device) for t in tensors]
    return *moved, entry.ggml_type, random((n,), torch.float32, device, 43) if bias else None


def _case(
    name: str,
    size: tuple[int, int, int],
    activation: str = "none",
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        features = size[1] // (1 if activation == "none" else 2)
        out = torch.full((size[0], features + 3), torch.nan, dtype=dtype, device=device)[:, 3:]
        return *_inputs(name, size, bias, device), activation, out

    title = f"plane_gemv-{name}-{'x'.join(map(str, size))}-{activation}{'-bias' * bias}"
    fns = plane_gemv, plane_gemv_reference, plane_gemv_launcher
    interpret = size[2] < 4096 and size[0] < 8  # the interpreter is slow
    return Case(title, *fns, build, mutates=(10,), interpret=interpret, aot=aot)


def _add_case(name: str, size: tuple[int, int, int], bias: bool = False) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        stream = random(size[:2], torch.float32, device, 44)
        return *_inputs(name, size, bias, device), stream

    title = f"plane_gemv_add-{name}-{'x'.join(map(str, size))}{'-bias' * bias}"
    fns = plane_gemv_add, plane_gemv_add_reference, plane_gemv_add_launcher
    interpret, aot = size[2] < 4096, BF16 * (size[0] == 1)
    return Case(title, *fns, build, mutates=(9,), interpret=interpret, aot=aot)


def _cases() -> Iterator[Case]:
    for name, entry in _TYPES.items():
        yield _case(name, (1, 6, 4096), aot=BF16)
        yield _case(name, (1, 9, 512))
        yield _case(name, (8, 5, 256), aot=BF16)
        yield _case(name, (3, 13, 768), bias=True)
        if entry.block_size == 32:
            yield _case(name, (2, 4, 1056))
    for activation in ("silu", "gelu_tanh"):
        yield _case("Q4_K", (1, 12, 1024), activation, aot=BOTH)
        yield _case("Q6_K", (5, 10, 512), activation, bias=True)
    for name, size in (("Q4_K", (1, 9, 14336)), ("Q6_K", (1, 9, 2048)), ("Q8_0", (4, 7, 288))):
        yield _add_case(name, size, bias=name == "Q8_0")


CASES = tuple(_cases())


def _runner(ggml_type: int, n: int, k: int, device: torch.device) -> Callable[[Config], None]:
    """One product, of the kind that weights of this size are for (see ``_problems``)."""
    entry, generator = gguf_formats()[ggml_type], torch.Generator(device).manual_seed(0)
    planes = random_planes(entry, n, k, device, generator)
    copies = [replace(planes, low=planes.low.clone()) for _ in range((256 << 20) // planes.nbytes)]
    weights = cycle([planes, *copies])
    quantized = quantize_rows(torch.randn((1, k), device=device), padded(k))
    add, gated = n <= k, 4 * k <= n <= 65536
    dtype = torch.float32 if add or n > 65536 else torch.bfloat16
    out = torch.zeros((1, n // 2 if gated else n), dtype=dtype, device=device)

    def run(config: Config) -> None:
        activation = "silu" if gated else "none"
        _gemv(quantized, next(weights).tensors, ggml_type, None, activation, out, add, config)

    return run


def _problems(shapes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """The types of the usual files. What a weight is for follows from its size, as for
    :mod:`squall.kernels.linear`: logits, the way back to the stream, gate and up, or the rest."""
    for name in ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0"):
        kind, bits = _TYPES[name].ggml_type, layout(_TYPES[name].ggml_type).bits
        for n, k in shapes:
            width = padded(k)
            tried = tuple(candidates(width * layout(kind).low_bits // 128))
            build = partial(_runner, kind, n, k)
            yield Problem(tuning_key(kind, n, width, 1), int(n * width * bits / 8), build, tried)


TUNABLE = Tunable("plane_gemv", _problems)
