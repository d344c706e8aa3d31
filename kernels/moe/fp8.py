"""A layer's experts with block-scaled FP8 weights:

    stream[t] += sum over j of weights[t, j] * (down act(gate_up x[t]))     of expert ids[t, j]

as ``dense_experts`` (:mod:`squall.kernels.moe.dense`), without biases. ``gate_up`` (gate rows, then
up rows) is codes, uint8 ``[E, 2 I, D]``, and float32 scales ``[E, 2 I / height, ceil(D / 128)]``
(:mod:`squall.kernels.quant.fp8`), ``down`` codes ``[E, D, I]`` and scales
``[E, D / height, ceil(I / 128)]``. The height of each follows from the shapes; it is the largest
power of two up to 128 that divides the rows of gate, or of down, so that blocks belong to one
matrix: :func:`row_height`. All are contiguous.

Activations are not quantised. They are of ``dtype`` between the products, which sum in float32; the
GEMV does not round what it normalises. On a GPU one token is a GEMV for each of its experts, more
are sorted by expert (:mod:`squall.kernels.moe.fp8_grouped`).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.moe.combine import combine
from squall.kernels.moe.dense import add_experts, random_routing
from squall.kernels.moe.fp8_grouped import fp8_grouped
from squall.kernels.moe.sort import block_for, sort_pairs
from squall.kernels.op import op
from squall.kernels.quant.fp8 import BLOCK, blocks_of, random_fp8
from squall.kernels.quant.fp8_gemv import expert_gemv
from squall.kernels.quant.fp8_gemv import supports as gemv_supports
from squall.kernels.quant.fp8_linear import fp8_linear_reference
from squall.kernels.rmsnorm import rms_norm


def row_height(rows: int) -> int:
    """Rows that share a scale where matrices of ``rows`` rows are put below each other."""
    return math.gcd(BLOCK, rows)


def check_experts(data: Tensor, scales: Tensor, rows: int) -> None:
    """Assert that they are the matrices of experts, of ``rows`` rows each or twice as many."""
    experts, n, k = data.shape
    wanted = experts, n // row_height(rows), blocks_of(k)
    assert n in (rows, 2 * rows), f"data {data.shape}, {rows} rows"
    assert data.dtype == torch.uint8, f"data {data.dtype}"
    assert scales.dtype == torch.float32, f"scales {scales.dtype}"
    assert scales.shape == wanted, f"data {data.shape}, {rows} rows, scales {scales.shape}"


def fp8_experts_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    dtype: torch.dtype,
    stream: Tensor,
) -> None:
    def product(some: Tensor, data: Tensor, scales: Tensor, expert: int) -> Tensor:
        height = data.shape[1] // scales.shape[1]
        one = data[expert], scales[expert], height
        return fp8_linear_reference(some, *one, None, torch.float32)

    def up(some: Tensor, expert: int) -> Tensor:
        y = product(some, gate_up, gate_up_scales, expert)
        return ACTIVATIONS[activation](y).to(dtype)

    def back(some: Tensor, expert: int) -> Tensor:
        return product(some, down, down_scales, expert).to(dtype)

    if norm is not None:
        x = rms_norm(x, norm, eps, dtype)
    add_experts(x, ids, weights, up, back, stream)


def fp8_experts_launcher(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    dtype: torch.dtype,
    stream: Tensor,
) -> None:
    (tokens, top_k), (experts, dim, inner) = ids.shape, down.shape
    check_experts(gate_up, gate_up_scales, inner)
    check_experts(down, down_scales, dim)
    assert norm is not None or x.dtype == dtype, f"x {x.dtype}, {dtype}"
    if tokens == 0:
        return
    first, second = (gate_up, gate_up_scales), (down, down_scales)
    x = x.contiguous()
    if tokens == 1 and gemv_supports(gate_up[0]) and gemv_supports(down[0]):
        hidden = torch.empty((top_k, inner), dtype=dtype, device=x.device)
        expert_gemv(x, *first, ids, activation, hidden, norm, eps)
        y = torch.empty((top_k, dim), dtype=dtype, device=x.device)
        expert_gemv(hidden, *second, ids, "none", y)
        combine(y, None, weights, stream)
    else:
        if norm is not None:
            x = rms_norm(x, norm, eps, dtype)
        tiles = sort_pairs(ids, experts, block_for(ids.numel(), experts))
        hidden = fp8_grouped(x, *first, tiles, top_k, activation)
        y = fp8_grouped(hidden, *second, tiles, 0, "none")
        combine(y, tiles.places, weights, stream)


def _fake(*_arguments: object) -> None:
    return None


fp8_experts = op(
    "fp8_experts(Tensor x, Tensor? norm, float eps, Tensor gate_up, Tensor gate_up_scales,"
    " Tensor down, Tensor down_scales, Tensor ids, Tensor weights, str activation,"
    " ScalarType dtype, Tensor(a!) stream) -> ()",
    fp8_experts_reference,
    fp8_experts_launcher,
    _fake,
)


def _random(
    experts: int, n: int, k: int, rows: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of experts of ``n`` rows, in matrices of ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    data, scales = random_fp8(experts * n, k, row_height(rows), torch.device("cpu"), generator)
    parts = data.view(experts, n, k), scales.view(experts, -1, blocks_of(k))
    return parts[0].to(device), parts[1].to(device)


def _case(
    size: tuple[int, int, int],
    routing: tuple[int, int],
    activation: str = "silu",
    normed: bool = False,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``size`` is tokens, D, I; ``routing`` is experts, experts a token."""
    (tokens, dim, inner), (experts, top_k) = size, routing

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((tokens, dim), torch.float32 if normed else dtype, device, 83)
        norm = random((dim,), torch.float32, device, 89) if normed else None
        up = _random(experts, 2 * inner, dim, inner, device, 84)
        down = _random(experts, dim, inner, dim, device, 85)
        # Large where results are rounded, so that float32's limit is about that of dtype.
        scale = 1 if dtype == torch.float32 else 1024
        stream = random((tokens, dim + 4), torch.float32, device, 87)[:, 4:] * scale
        routed = random_routing(tokens, experts, top_k, device)
        return x, norm, 1e-5, *up, *down, *routed, activation, dtype, stream

    title = f"fp8_experts-{activation}-{'x'.join(map(str, (*size, *routing)))}"
    fns = fp8_experts, fp8_experts_reference, fp8_experts_launcher
    return Case(f"{title}{'-norm' * normed}", *fns, build, mutates=(11,), aot=aot)


def _cases() -> Iterator[Case]:
    half = (torch.bfloat16, torch.float16)
    yield _case((1, 144, 48), (6, 2), normed=True, aot=BOTH)
    yield _case((1, 32, 144), (3, 2), "clamped_silu")
    yield _case((1, 33, 7), (4, 2))  # rows of no whole chunks
    yield _case((0, 64, 32), (4, 2))
    yield _case((9, 256, 128), (32, 4), normed=True, aot=(*half, torch.float32))
    yield _case((6, 200, 330), (5, 2), "gelu_tanh", normed=True, aot=BF16)
    yield _case((33, 45, 23), (4, 2), aot=BF16)  # rows of odd length
    yield _case((25, 128, 48), (3, 1), aot=BF16)
    yield _case((70, 128, 96), (3, 1), aot=BF16)
    yield _case((90, 256, 136), (2, 2), aot=half)
    yield _case((300, 32, 16), (2, 2))


CASES = tuple(_cases())
