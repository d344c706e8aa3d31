"""A layer's experts with dense weights:

    stream[t] += sum over j of weights[t, j] * (down act(gate_up x[t]))     of expert ids[t, j]

``gate_up [E, 2 I, D]`` (gate rows, then up rows) and ``down [E, D, I]`` are f32, f16 or bf16,
contiguous, their biases ``[E, 2 I]`` and ``[E, D]`` or None. ``x [T, D]`` has their dtype, or is
float32 and still to be normalised: with ``norm`` (float32 ``[D]``) and ``eps`` it stands for
``x / sqrt(mean(x^2) + eps) * norm``. ``ids`` int32 and ``weights`` float32 ``[T, k]`` come from
:mod:`squall.kernels.moe.route`; ``stream`` is float32 ``[T, D]``, its rows may be strided.
``activation`` is a gated one of :mod:`squall.kernels.activation`.

On a GPU one token is a GEMV for each of its experts, which normalises x itself; more tokens are
sorted by expert, and tensor cores read every weight once.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.linear_gemv import expert_gemv
from squall.kernels.linear_gemv import supports as gemv_supports
from squall.kernels.moe.combine import combine
from squall.kernels.moe.grouped import grouped
from squall.kernels.moe.sort import block_for, sort_pairs
from squall.kernels.op import op
from squall.kernels.rmsnorm import rms_norm

Product = Callable[[Tensor, int], Tensor]  # of some rows with an expert's weight


def add_experts(
    x: Tensor, ids: Tensor, weights: Tensor, up: Product, down: Product, stream: Tensor
) -> None:
    """The formula above, one chosen expert after the other; ``up`` includes the activation."""
    for expert in torch.unique(ids).tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        y = down(up(x[token], expert), expert)
        stream.index_add_(0, token, y.float() * weights[token, slot, None])


def dense_experts_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    stream: Tensor,
) -> None:
    def product(some: Tensor, w: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        return F.linear(some, w[expert], None if bias is None else bias[expert].to(w.dtype))

    if norm is not None:
        x = rms_norm(x, norm, eps, gate_up.dtype)
    add_experts(
        x,
        ids,
        weights,
        lambda some, e: ACTIVATIONS[activation](product(some, gate_up, gate_up_bias, e)),
        lambda some, e: product(some, down, down_bias, e),
        stream,
    )


def dense_experts_launcher(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    stream: Tensor,
) -> None:
    (tokens, top_k), (experts, dim, inner) = ids.shape, down.shape
    if tokens == 0:
        return
    x = x.contiguous()
    if tokens == 1 and gemv_supports(gate_up[0]) and gemv_supports(down[0]):
        hidden = torch.empty((top_k, inner), dtype=down.dtype, device=x.device)
        expert_gemv(x, gate_up, gate_up_bias, ids, activation, hidden, norm, eps)
        y = torch.empty((top_k, dim), dtype=down.dtype, device=x.device)
        expert_gemv(hidden, down, down_bias, ids, "none", y)
        combine(y, None, weights, stream)
    else:
        if norm is not None:
            x = rms_norm(x, norm, eps, gate_up.dtype)
        tiles = sort_pairs(ids, experts, block_for(ids.numel(), experts))
        hidden = grouped(x, gate_up, gate_up_bias, tiles, top_k, activation)
        y = grouped(hidden, down, down_bias, tiles, 0, "none")
        combine(y, tiles.places, weights, stream)


def _fake(*_arguments: object) -> None:
    return None


dense_experts = op(
    "dense_experts(Tensor x, Tensor? norm, float eps, Tensor gate_up, Tensor? gate_up_bias,"
    " Tensor down, Tensor? down_bias, Tensor ids, Tensor weights, str activation,"
    " Tensor(a!) stream) -> ()",
    dense_experts_reference,
    dense_experts_launcher,
    _fake,
)


def random_routing(
    tokens: int, experts: int, top_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Different experts for every token, and weights, for tests."""
    ids = random((tokens, experts), torch.float32, torch.device("cpu"), 81).topk(top_k).indices
    return ids.int().to(device), random((tokens, top_k), torch.float32, device, 82)


def _case(
    size: tuple[int, int, int],
    routing: tuple[int, int],
    activation: str = "silu",
    options: str = "",
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``size`` is tokens, D, I; ``routing`` is experts, experts a token; ``options``: "norm",
    "bias"."""
    (tokens, dim, inner), (experts, top_k) = size, routing

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        normed = "norm" in options
        x = random((tokens, dim), torch.float32 if normed else dtype, device, 83)
        norm = random((dim,), torch.float32, device, 89) if normed else None
        up = (random((experts, 2 * inner, dim), torch.float32, device, 84) / dim**0.5).to(dtype)
        down = (random((experts, dim, inner), torch.float32, device, 85) / inner**0.5).to(dtype)
        biases: list[Tensor | None] = [None, None]
        if "bias" in options:
            biases = [random((experts, n), dtype, device, 86) for n in (2 * inner, dim)]
        stream = random((tokens, dim + 4), torch.float32, device, 87)[:, 4:]
        routed = random_routing(tokens, experts, top_k, device)
        return x, norm, 1e-5, up, biases[0], down, biases[1], *routed, activation, stream

    title = f"dense_experts-{activation}-{'x'.join(map(str, (*size, *routing)))}"
    fns = dense_experts, dense_experts_reference, dense_experts_launcher
    name = f"{title}{'-' * bool(options)}{options}"
    return Case(name, *fns, build, mutates=(10,), aot=aot, through=torch.float32)


def _cases() -> Iterator[Case]:
    yield _case((1, 256, 64), (8, 3), options="norm", aot=BF16)
    yield _case((1, 264, 72), (4, 4), "clamped_silu", "bias", aot=BF16)
    yield _case((1, 33, 7), (4, 2))
    yield _case((0, 64, 32), (4, 2))
    yield _case((9, 256, 64), (32, 4), options="norm", aot=BOTH)
    yield _case((6, 72, 40), (5, 2), "clamped_silu", "norm-bias")
    yield _case((33, 45, 23), (4, 2), "gelu_tanh")
    yield _case((70, 128, 96), (3, 1), aot=BF16)
    yield _case((90, 64, 48), (2, 2), aot=BF16)
    yield _case((700, 32, 16), (2, 2))


CASES = tuple(_cases())
