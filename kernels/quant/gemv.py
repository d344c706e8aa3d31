"""Products of one row with quantised weights, by four-way byte products (dp4a):

    out    = act(rms_norm(x) W^T + bias)               plane_gemv; norm is optional
    out    = [rms_norm(x) V^T, rms_norm(x) W^T] + bias  plane_gemv_pair
    stream += x W^T + bias                             plane_gemv_add

``x [M, K]`` is f32, f16 or bf16, W (and V) ``[N, K]`` in planes
(:mod:`squall.kernels.quant.planes`). The norm is ``x / sqrt(mean(x^2) + eps) * norm`` with ``norm``
float32 ``[K]``. ``out`` is ``[M, N]`` of any float dtype, ``stream`` float32 ``[M, N]``; rows may
be strided. With ``activation`` "silu" or "gelu_tanh" W is ``[2F, K]``, gate rows then up rows, and
``out [M, F]`` is ``act(gate) * up``. ``bias`` is ``[N]`` or None.

Activations are rounded to 16 bits a block of 32 (:mod:`squall.kernels.quant.gemv_input`), sums are
float32. Up to eight rows are possible, each of which reads all weights: this is for one row, and
for few rows of float32 models, which have no other fused product.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.op import dependent_launch, has_ptx, multiprocessors, op
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.gemv_kernel import plane_gemv_kernel
from squall.kernels.quant.planes import (
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

MAX_ROWS = 8


def rounded(x: Tensor) -> Tensor:
    """``x [M, K]`` as float32 of 16 bits a block of 32 columns."""
    rows, k = x.shape
    blocks = F.pad(x.float(), (0, -k % 32)).reshape(rows, -(-k // 32), 32)
    scale = (blocks.abs().amax(-1, keepdim=True) * (1 / 32639)).clamp(min=2.0**-100)
    x16 = (blocks.double() * (1 / scale).double()).round().float()
    return (x16 * scale).flatten(1)[:, :k]


def _product(x: Tensor, planes: Tensors, ggml_type: int, bias: Tensor | None) -> Tensor:
    weights = dequantize(Planes(gguf_formats()[ggml_type], x.shape[1], *planes))
    return F.linear(rounded(x), weights, None if bias is None else bias.float())


def plane_gemv_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    out.copy_(ACTIVATIONS[activation](_product(x, (low, high, scales, supers), ggml_type, bias)))


def plane_gemv_pair_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
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
        plane_gemv_reference(x, norm, eps, *tensors, kind, side.bias, "none", side.out)


def plane_gemv_add_reference(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    stream += _product(x, (low, high, scales, supers), ggml_type, bias)


def _kept(chunks: int) -> int:
    """Chunks of a row that a program keeps: a power of two. With fewer than 32, a thread would
    have less than the four words of x that are multiplied at a time."""
    return max(32, next_power_of_2(chunks))


def rule(chunks: int) -> Config:
    """Launch parameters where no table has the problem: a chunk of x a thread as far as possible,
    for a tile's registers grow with the chunks; as many programs as make 16 warps a multiprocessor.

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


def _word_bits(plan: Layout) -> int:
    """Of the words in which scales are loaded: those of a unit, or 32."""
    return 16 if plan.low_bits == 8 or plan.scales == "power" else 32


def _as_words(scales: Tensor, bits: int) -> Tensor:
    """Scales as the kernel loads them: ``[N, words]`` of 16 or 32 bits."""
    return scales.view(scales.shape[0], -1).view(torch.int16 if bits == 16 else torch.int32)


def _check(x: Tensor, norm: Tensor | None, low: Tensor, bits: int, epilogue: Epilogue) -> None:
    (rows, k), out, n = x.shape, epilogue.out, low.shape[0]
    assert rows <= MAX_ROWS, f"{rows} rows; at most {MAX_ROWS} are supported"
    assert k % 32 == 0, f"x {x.shape}: rows must be blocks of 32"
    assert low.shape[1] * 32 == padded(k) * bits, f"x {x.shape}, low {low.shape}"
    assert n == epilogue.features * (1 + epilogue.gated), f"low {low.shape}, out {out.shape}"
    assert out.shape[0] == rows, f"x {x.shape}, out {out.shape}"
    assert epilogue.bias is None or epilogue.bias.shape == (n,), f"bias for {n} rows"
    assert x.stride(1) == out.stride(1) == 1, "rows must be dense"
    assert norm is None or (norm.shape == (k,) and norm.dtype == torch.float32), "norm"


def gemv(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    planes: Tensors,
    ggml_type: int,
    epilogue: Epilogue,
    config: Config | None = None,
    order: str = "alone",
) -> None:
    """Launch; ``config`` overrides the table (tuning), ``order`` as in ``wait_in_order``."""
    low, plan = planes[0], layout(ggml_type)
    _check(x, norm, low, plan.low_bits, epilogue)
    if x.shape[0]:
        config = config or tuned(
            "plane_gemv", tuning_key(ggml_type, low.shape[0], padded(x.shape[1]), 1), low.device
        )
        _launch(x, norm, eps, planes, plan, epilogue, None, config, order)


def expert_gemv(
    x: Tensor,
    planes: Tensors,
    ggml_type: int,
    bias: Tensor | None,
    ids: Tensor,
    activation: str,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """``out [P, F] = act(x' W[ids]^T + bias[ids])``: the planes have the rows of all experts, one
    below the other; ``x [P / share, K]``; ``ids`` int32 of P >= 1 elements; ``bias [E, N]``."""
    plan, low = layout(ggml_type), planes[0]
    (rows, k), pairs = x.shape, out.shape[0]
    assert low.shape[1] * 32 == padded(k) * plan.low_bits, f"x {x.shape}, low {low.shape}"
    assert k % 32 == 0 and pairs % rows == 0, f"x {x.shape}, out {out.shape}"  # noqa: PT018
    assert ids.numel() == pairs and ids.dtype == torch.int32, f"ids {ids.shape}"  # noqa: PT018
    assert x.stride(1) == out.stride(1) == 1, "rows must be dense"
    _launch(x, norm, eps, planes, plan, Epilogue(out, bias, activation), ids, None)


def _launch(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    planes: Tensors,
    plan: Layout,
    epilogue: Epilogue,
    ids: Tensor | None,
    config: Config | None,
    order: str = "alone",
) -> None:
    (low, high, scales, supers), (rows, k), pairs = planes, x.shape, epilogue.out.shape[0]
    if x.data_ptr() % 16 or (rows > 1 and x.stride(0) % 16):
        x = x.clone(memory_format=torch.contiguous_format)  # loads are of four numbers at once
    config = config or rule(low.shape[1] // 4)
    tile = config["rows"]
    tiles = -(-epilogue.features // (tile // 2 if epilogue.gated else tile))
    programs = config["programs"] * multiprocessors(low.device)
    if ids is not None:  # those of all pairs together fill the GPU
        programs = -(-programs // pairs)
    pdl = dependent_launch(low.device)
    plane_gemv_kernel[(min(tiles, programs), pairs)](
        x,
        norm,
        low,
        high,
        _as_words(scales, _word_bits(plan)),
        None if supers is None else _as_words(supers, 32 if plan.paired else 16),
        epilogue.bias,
        epilogue.out,
        ids,
        epilogue.features,
        x.stride(0) if rows > 1 else k,
        epilogue.out.stride(0),
        eps,
        k,
        padded(k) // 256,
        _kept(low.shape[1] // 4),
        plan.low_bits,
        plan.high_bits,
        plan.offset,
        plan.group,
        plan.scales,
        epilogue.activation,
        epilogue.add,
        tile,
        has_ptx(low.device),
        bool(pdl),
        order,
        pairs // rows,
        num_warps=config["warps"],
        **pdl,
    )


def plane_gemv_launcher(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
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
    planes = (low, high, scales, supers)
    gemv(x, norm, eps, planes, ggml_type, Epilogue(out, bias, activation))


def plane_gemv_pair_launcher(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    first: list[Tensor | None],
    first_type: int,
    second: list[Tensor | None],
    second_type: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    left, right = Epilogue(out, bias).split_at(cast(Tensors, first)[0].shape[0])
    gemv(x, norm, eps, cast(Tensors, first), first_type, left, order="first")
    gemv(x, norm, eps, cast(Tensors, second), second_type, right, order="second")


def plane_gemv_add_launcher(
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
    planes = (low, high, scales, supers)
    gemv(x, None, 0.0, planes, ggml_type, Epilogue(stream, bias, add=True))


def _fake(*_arguments: object) -> None:
    return None


_PLANES = "Tensor low, Tensor? high, Tensor scales, Tensor? supers, int ggml_type, Tensor? bias"
plane_gemv = op(
    f"plane_gemv(Tensor x, Tensor? norm, float eps, {_PLANES}, str activation, Tensor(a!) out)"
    " -> ()",
    plane_gemv_reference,
    plane_gemv_launcher,
    _fake,
)
plane_gemv_pair = op(
    "plane_gemv_pair(Tensor x, Tensor? norm, float eps, Tensor?[] first, int first_type,"
    " Tensor?[] second, int second_type, Tensor? bias, Tensor(a!) out) -> ()",
    plane_gemv_pair_reference,
    plane_gemv_pair_launcher,
    _fake,
)
plane_gemv_add = op(
    f"plane_gemv_add(Tensor x, {_PLANES}, Tensor(a!) stream) -> ()",
    plane_gemv_add_reference,
    plane_gemv_add_launcher,
    _fake,
)

_TYPES = {entry.name: entry for entry in gguf_formats().values() if entry.unpack is not None}


def _planes(name: str, n: int, k: int, device: torch.device) -> tuple[object, ...]:
    """``low`` to ``ggml_type``."""
    entry, cpu = _TYPES[name], torch.device("cpu")
    planes = random_planes(entry, n, k, cpu, torch.Generator().manual_seed(41))
    moved = [None if t is None else t.to(device) for t in planes.tensors]
    return *moved, entry.ggml_type


def _case(
    name: str,
    size: tuple[int, int, int],
    activation: str = "none",
    options: str = "",
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``size`` is M, N, K; ``options``: "norm", "bias"."""
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        normed = "norm" in options
        x = random((m, k + 8), torch.float32 if normed else dtype, device, 42)[:, 8:]
        norm = random((k,), torch.float32, device, 45) if normed else None
        features = n // (1 if activation == "none" else 2)
        out = torch.full((m, features + 3), torch.nan, dtype=dtype, device=device)[:, 3:]
        bias = random((n,), torch.float32, device, 43) if "bias" in options else None
        return x, norm, 1e-5, *_planes(name, n, k, device), bias, activation, out

    title = f"plane_gemv-{name}-{m}x{n}x{k}-{activation}{'-' * bool(options)}{options}"
    fns = plane_gemv, plane_gemv_reference, plane_gemv_launcher
    interpret = size[2] < 4096 and size[0] < 8  # the interpreter is slow
    return Case(title, *fns, build, mutates=(10,), interpret=interpret, aot=aot)


def _add_case(name: str, size: tuple[int, int, int], bias: bool = False) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((m, k), dtype, device, 42)
        stream = random((m, n + 4), torch.float32, device, 44)[:, 4:]
        vector = random((n,), torch.float32, device, 43) if bias else None
        return x, *_planes(name, n, k, device), vector, stream

    title = f"plane_gemv_add-{name}-{m}x{n}x{k}{'-bias' * bias}"
    fns = plane_gemv_add, plane_gemv_add_reference, plane_gemv_add_launcher
    interpret, aot = size[2] < 4096, BF16 * (m == 1)
    return Case(title, *fns, build, mutates=(7,), interpret=interpret, aot=aot)


def _pair_case(
    names: tuple[str, str], size: tuple[int, int, int], bias: bool = False, norm: bool = True
) -> Case:
    """N of the first weight, of which the second has half."""
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((m, k), torch.float32 if norm else dtype, device, 42)
        scale = random((k,), torch.float32, device, 45) if norm else None
        *first, first_type = _planes(names[0], n, k, device)
        *second, second_type = _planes(names[1], n // 2, k, device)
        total = n + n // 2
        some_bias = random((total,), torch.float32, device, 43) if bias else None
        out = torch.full((m, total + 3), torch.nan, dtype=dtype, device=device)[:, 3:]
        return x, scale, 1e-5, first, first_type, second, second_type, some_bias, out

    title = f"plane_gemv_pair-{'-'.join(names)}-{m}x{n}x{k}{'-bias' * bias}"
    fns = plane_gemv_pair, plane_gemv_pair_reference, plane_gemv_pair_launcher
    interpret, aot = k < 4096, (torch.float16,) * bias
    return Case(title, *fns, build, mutates=(8,), interpret=interpret, aot=aot)


def _cases() -> Iterator[Case]:
    yield _pair_case(("Q4_K", "Q6_K"), (1, 10, 512), bias=True)
    yield _pair_case(("Q8_0", "Q5_0"), (2, 6, 288), norm=False)
    yield _pair_case(("Q4_K", "Q6_K"), (1, 2048, 4096))
    for name, entry in _TYPES.items():
        yield _case(name, (1, 6, 4096), options="norm", aot=BF16)
        yield _case(name, (1, 9, 512))
        yield _case(name, (8, 5, 256), aot=BF16)
        yield _case(name, (3, 13, 768), options="norm-bias")
        if entry.block_size == 32:
            yield _case(name, (2, 4, 1056))
    for activation in ("silu", "gelu_tanh"):
        yield _case("Q4_K", (1, 12, 1024), activation, "norm", aot=BOTH)
        yield _case("Q6_K", (5, 10, 512), activation, "bias")
    for name, size in (("Q4_K", (1, 9, 14336)), ("Q6_K", (1, 9, 2048)), ("Q8_0", (4, 7, 288))):
        yield _add_case(name, size, bias=name == "Q8_0")


CASES = tuple(_cases())
