"""A layer's experts with weights in planes:

    stream[t] += sum over j of weights[t, j] * (down act(gate_up x[t]))     of expert ids[t, j]

as ``dense_experts`` (:mod:`squall.kernels.moe.dense`). ``gate_up`` are the planes ``low, high,
scales, supers`` (:mod:`squall.kernels.quant.planes`) of gate and up, one below the other in every
expert, and ``up_types`` their GGML type; where gate and up differ in type, the planes of gate and
those of up, and two types. ``down`` has one type. Planes have the rows of all experts, one below
the other. Biases are ``[E, 2 I]`` and ``[E, D]``.

Rounding is that of :mod:`squall.kernels.quant.gemm`, with one token or float32 activations that of
:mod:`squall.kernels.quant.gemv`. ``dtype`` is that of the activations.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, Case, random
from squall.kernels.moe.combine import combine
from squall.kernels.moe.dense import add_experts, random_routing
from squall.kernels.moe.plane_grouped import plane_grouped
from squall.kernels.moe.sort import Tiles, block_for, sort_pairs
from squall.kernels.op import op
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.gemv import expert_gemv
from squall.kernels.quant.planes import Planes, Tensors, dequantize, random_planes
from squall.kernels.rmsnorm import rms_norm

Part = tuple[Tensors, int]  # planes and their type


def _parts(planes: Sequence[Tensor | None], types: Sequence[int]) -> list[Part]:
    return [(cast(Tensors, tuple(planes[4 * i : 4 * i + 4])), t) for i, t in enumerate(types)]


def _sparse(tokens: int, dtype: torch.dtype) -> bool:
    """Whether every pair is a product of its own: tensor cores have no float32, and one token has
    no two pairs of one expert."""
    return tokens == 1 or dtype == torch.float32


def _weight(part: Part, columns: int, expert: int, experts: int) -> Tensor:
    """An expert's matrix, float32."""
    tensors, kind = part
    planes = Planes(gguf_formats()[kind], columns, *tensors)
    rows = planes.out_features // experts
    own = torch.arange(expert * rows, (expert + 1) * rows, device=planes.low.device)
    return dequantize(planes.select(own))


def plane_experts_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: list[Tensor | None],
    up_types: list[int],
    gate_up_bias: Tensor | None,
    down: list[Tensor | None],
    down_type: int,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    activation: str,
    dtype: torch.dtype,
    stream: Tensor,
) -> None:
    first, ((second, kind),) = _parts(gate_up, up_types), _parts(down, [down_type])
    if norm is not None:
        x = rms_norm(x, norm, eps, torch.float32 if _sparse(x.shape[0], dtype) else dtype)

    def up(some: Tensor, expert: int) -> Tensor:
        w = torch.cat([_weight(part, some.shape[1], expert, experts) for part in first])
        bias = None if gate_up_bias is None else gate_up_bias[expert].float()
        return ACTIVATIONS[activation](F.linear(some.float(), w, bias)).to(dtype)

    def back(some: Tensor, expert: int) -> Tensor:
        bias = None if down_bias is None else down_bias[expert].float()
        w = _weight((second, kind), some.shape[1], expert, experts)
        return F.linear(some.float(), w, bias).to(dtype)

    add_experts(x, ids, weights, up, back, stream)


def plane_experts_launcher(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: list[Tensor | None],
    up_types: list[int],
    gate_up_bias: Tensor | None,
    down: list[Tensor | None],
    down_type: int,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    activation: str,
    dtype: torch.dtype,
    stream: Tensor,
) -> None:
    if ids.shape[0] == 0:
        return
    parts, ((planes, kind),) = _parts(gate_up, up_types), _parts(down, [down_type])
    if _sparse(ids.shape[0], dtype):
        hidden = _up(x, norm, eps, parts, gate_up_bias, ids, None, experts, activation, dtype)
        y = x.new_empty((ids.numel(), stream.shape[1]), dtype=dtype)
        expert_gemv(hidden, planes, kind, down_bias, ids, "none", y)
        combine(y, None, weights, stream)
    else:
        if norm is not None:
            x = rms_norm(x, norm, eps, dtype)
        tiles = sort_pairs(ids, experts, block_for(ids.numel(), experts))
        hidden = _up(x, None, eps, parts, gate_up_bias, ids, tiles, experts, activation, dtype)
        y = x.new_empty((hidden.shape[0], stream.shape[1]), dtype=dtype)
        plane_grouped(hidden, planes, kind, down_bias, tiles, 0, "none", y)
        combine(y, tiles.places, weights, stream)


def _up(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    parts: list[Part],
    bias: Tensor | None,
    ids: Tensor,
    tiles: Tiles | None,
    experts: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``[P, I]``, or with ``tiles`` a row for every place."""
    rows = ids.numel() if tiles is None else tiles.total * tiles.block
    sizes = [tensors[0].shape[0] // experts for tensors, _ in parts]
    fused = activation if len(parts) == 1 else "none"
    hidden = x.new_empty((rows, sum(sizes) // (1 if fused == "none" else 2)), dtype=dtype)
    columns = [hidden] if len(parts) == 1 else torch.split(hidden, sizes, 1)
    biases = [None] * len(parts) if bias is None else torch.split(bias, sizes, 1)
    for (planes, kind), own, out in zip(parts, biases, columns, strict=True):
        own = None if own is None else own.contiguous()
        if tiles is None:
            expert_gemv(x, planes, kind, own, ids, fused, out, norm, eps)
        else:
            plane_grouped(x, planes, kind, own, tiles, ids.shape[1], fused, out)
    return hidden if fused != "none" else ACTIVATIONS[activation](hidden)


def _fake(*_arguments: object) -> None:
    return None


plane_experts = op(
    "plane_experts(Tensor x, Tensor? norm, float eps, Tensor?[] gate_up, int[] up_types,"
    " Tensor? gate_up_bias, Tensor?[] down, int down_type, Tensor? down_bias, Tensor ids,"
    " Tensor weights, int experts, str activation, ScalarType dtype, Tensor(a!) stream) -> ()",
    plane_experts_reference,
    plane_experts_launcher,
    _fake,
)


def _case(
    types: Sequence[str],
    size: tuple[int, int, int],
    routing: tuple[int, int],
    activation: str = "silu",
    options: str = "",
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``types`` of gate and up, or of each, and of down; ``size`` is tokens, D, I; ``routing`` is
    experts, experts a token; ``options``: "norm", "bias"."""
    (tokens, dim, inner), (experts, top_k) = size, routing
    formats = {entry.name: entry for entry in gguf_formats().values()}

    def planes(name: str, n: int, k: int, device: torch.device) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(84 + n)
        made = random_planes(formats[name], experts * n, k, torch.device("cpu"), generator)
        return [None if t is None else t.to(device) for t in made.tensors]

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        normed = "norm" in options
        x = random((tokens, dim), torch.float32 if normed else dtype, device, 83)
        norm = random((dim,), torch.float32, device, 89) if normed else None
        *ups, last = types
        rows = 2 * inner // len(ups)
        up = [t for name in ups for t in planes(name, rows, dim, device)]
        biases: list[Tensor | None] = [None, None]
        if "bias" in options:
            biases = [random((experts, n), torch.float32, device, 86) for n in (2 * inner, dim)]
        stream = random((tokens, dim + 4), torch.float32, device, 87)[:, 4:]
        kinds = [formats[name].ggml_type for name in types]
        back = planes(last, dim, inner, device)
        routed = random_routing(tokens, experts, top_k, device)
        arguments = up, kinds[:-1], biases[0], back, kinds[-1], biases[1]
        return x, norm, 1e-5, *arguments, *routed, experts, activation, dtype, stream

    title = f"plane_experts-{'-'.join(types)}-{activation}-{'x'.join(map(str, (*size, *routing)))}"
    fns = plane_experts, plane_experts_reference, plane_experts_launcher
    interpret = dim * inner * top_k <= 2048  # the interpreter is slow
    name = f"{title}{'-' * bool(options)}{options}"
    return Case(
        name, *fns, build, mutates=(14,), interpret=interpret, aot=aot, through=torch.float16
    )


def _cases() -> Iterator[Case]:
    f16 = (torch.float16,)
    for entry in gguf_formats().values():
        if entry.unpack is not None:
            types, small = (entry.name, entry.name), entry.block_size == 32
            dim = 64 if small else 512
            # The types' own variants are compiled for plain products already.
            aot = f16 if entry.name in ("Q4_K", "Q6_K", "Q8_0", "MXFP4") else ()
            yield _case(types, (1, dim, dim // 2), (5, 3), options="norm", aot=aot)
            yield _case(types, (9, dim, dim // 2), (5, 2), options="bias", aot=aot)
    yield _case(("Q4_K", "Q6_K"), (0, 256, 256), (4, 2))
    yield _case(("Q4_0", "Q8_0"), (1, 32, 32), (3, 2), options="norm-bias")
    yield _case(("Q8_0", "Q4_0", "Q5_0"), (5, 32, 32), (3, 2), "clamped_silu", "norm-bias")
    yield _case(("Q4_K", "Q5_K", "Q6_K"), (1, 256, 256), (4, 2), options="norm-bias")
    yield _case(("Q8_0", "Q4_0", "Q5_0"), (20, 64, 96), (4, 2), "clamped_silu", "norm-bias", BF16)
    yield _case(("Q4_K", "Q6_K"), (40, 256, 256), (6, 2), "gelu_tanh", aot=BF16)
    yield _case(("Q6_K", "Q4_K"), (90, 256, 256), (3, 1), aot=BF16)
    yield _case(("Q6_K", "Q8_0"), (150, 256, 64), (2, 2), aot=f16)


CASES = tuple(_cases())
