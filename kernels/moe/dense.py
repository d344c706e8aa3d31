"""Products of tokens with their experts' dense weights.

    expert_linear    y[i] = act(x[i // share] w[ids[i]]^T + bias[ids[i]])

for every pair i of a token and one of its experts, token by token: ``ids`` is int32 ``[P]``, and
``x [P / share, K]`` has a row for every token, or one for every pair (``share`` 1). ``w [E, N, K]``
is f32, f16 or bf16, contiguous, x has its dtype, ``bias`` is ``[E, N]`` or None. ``activation`` is
"none" (y is ``[P, N]``) or a gated one of :mod:`squall.kernels.activation` for experts of gate rows
and then up rows (``[P, N / 2]``). y has the dtype of x.

A GPU has two ways. With the pairs sorted into tiles (:mod:`squall.kernels.moe.sort`: ``order``,
``experts``, ``rows`` and ``block``) tensor cores read every weight once; without, there is a GEMV
for every pair, which is best for one token, whose experts are all different.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.linear_gemv import expert_gemv
from squall.kernels.moe.grouped import grouped
from squall.kernels.moe.sort import Tiles, sort_pairs
from squall.kernels.op import op


def by_expert(
    x: Tensor, ids: Tensor, features: int, product: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """``y [P, features]``, one chosen expert after the other: ``product(rows of x, expert)``."""
    share = ids.numel() // max(1, x.shape[0])
    y = x.new_empty(ids.numel(), features)
    for expert in torch.unique(ids).tolist():
        pairs = (ids == expert).nonzero().squeeze(1)
        y[pairs] = product(x[pairs // share], expert)
    return y


def expert_linear_reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    order: Tensor | None,
    experts: Tensor | None,
    rows: Tensor | None,
    block: int,
    activation: str,
) -> Tensor:
    """``[P, F]``; the tiles say nothing that ``ids`` does not."""

    def product(some: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert].to(x.dtype)
        return ACTIVATIONS[activation](F.linear(some, w[expert], own))

    return by_expert(x, ids, _features(w, activation), product)


def _features(w: Tensor, activation: str) -> int:
    return w.shape[1] // (1 if activation == "none" else 2)


def expert_linear_launcher(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    order: Tensor | None,
    experts: Tensor | None,
    rows: Tensor | None,
    block: int,
    activation: str,
) -> Tensor:
    y = _fake(x, w, bias, ids, order, experts, rows, block, activation)
    if y.shape[0] == 0:
        return y
    x = x.contiguous()
    if order is None or experts is None or rows is None:
        expert_gemv(x, w, bias, ids, activation, y)
    else:
        grouped(x, w, bias, Tiles(order, experts, rows, block), activation, y)
    return y


def _fake(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    order: Tensor | None,
    experts: Tensor | None,
    rows: Tensor | None,
    block: int,
    activation: str,
) -> Tensor:
    return x.new_empty(ids.numel(), _features(w, activation))


expert_linear = op(
    "expert_linear(Tensor x, Tensor w, Tensor? bias, Tensor ids, Tensor? order, Tensor? experts,"
    " Tensor? rows, int block, str activation) -> Tensor",
    expert_linear_reference,
    expert_linear_launcher,
    _fake,
)


def random_pairs(
    tokens: int, experts: int, top_k: int, block: int, device: torch.device
) -> tuple[object, ...]:
    """Different experts for every token: ``ids`` to ``block``, for tests. ``block`` 0: no tiles."""
    ids = random((tokens, experts), torch.float32, torch.device("cpu"), 81).topk(top_k).indices
    flat = ids.int().flatten().to(device)
    none = (None, None, None, 0)
    return flat, *(sort_pairs(flat, experts, block) if block and tokens else none)


def _case(
    size: tuple[int, int, int],
    routing: tuple[int, int, int],
    activation: str = "none",
    bias: bool = False,
    shared: bool = True,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``size`` is tokens, N, K; ``routing`` is experts, experts a token, places of a tile."""
    (tokens, n, k), (experts, top_k, block) = size, routing

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((tokens * (1 if shared else top_k), k), dtype, device, 83)
        w = (random((experts, n, k), torch.float32, device, 84) / k**0.5).to(dtype)
        vector = random((experts, n), dtype, device, 85) if bias else None
        return x, w, vector, *random_pairs(tokens, experts, top_k, block, device), activation

    title = f"expert_linear-{activation}-{'x'.join(map(str, (*size, *routing)))}{'-bias' * bias}"
    fns = expert_linear, expert_linear_reference, expert_linear_launcher
    return Case(title, *fns, build, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case((0, 64, 32), (4, 2, 8))
    yield _case((9, 128, 256), (32, 4, 8), "silu", aot=BOTH)
    yield _case((9, 72, 256), (32, 4, 16), shared=False, bias=True, aot=BF16)
    yield _case((6, 80, 72), (5, 2, 8), "clamped_silu", bias=True)
    yield _case((33, 46, 45), (4, 2, 32), "gelu_tanh")
    yield _case((33, 23, 45), (4, 2, 32), shared=False)
    yield _case((90, 192, 128), (3, 1, 64), "silu", aot=BF16)
    yield _case((140, 48, 72), (2, 2, 128), aot=BF16)


CASES = tuple(_cases())
