"""Mixtures of experts: routing and the experts' operators against formulas in float64."""

import math

import pytest
import torch
from torch import Tensor

from squall.kernels.cases import Case, results
from squall.kernels.moe import dense, planes, route
from squall.kernels.moe.sort import Tiles, block_for, sort_pairs
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.planes import Planes, dequantize

CPU = torch.device("cpu")


def _activated(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    cubed = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(cubed)) * up


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm


def _experts(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    stream: Tensor,
) -> tuple[Tensor, ...]:
    """Token by token, expert by expert."""
    total = stream.double()
    for token in range(ids.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            inner = up[expert].double() @ x[token]
            if up_bias is not None:
                inner += up_bias[expert].double()
            y = down[expert].double() @ _activated(inner, activation)
            if down_bias is not None:
                y += down_bias[expert].double()
            total[token] += weight * y
    return (total.float(),)


def naive_dense(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    stream: Tensor,
) -> tuple[Tensor, ...]:
    routed = ids, weights, activation, stream
    return _experts(_normed(x, norm, eps), up, up_bias, down, down_bias, *routed)


def naive_planes(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    up: list[Tensor],
    up_types: list[int],
    up_bias: Tensor | None,
    down: list[Tensor],
    down_type: int,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    activation: str,
    dtype: torch.dtype,
    stream: Tensor,
) -> tuple[Tensor, ...]:
    def matrices(tensors: list[Tensor], kind: int, columns: int) -> Tensor:
        rows = dequantize(Planes(gguf_formats()[kind], columns, *tensors))
        return rows.view(experts, -1, columns)

    parts = [matrices(up[4 * i : 4 * i + 4], t, x.shape[1]) for i, t in enumerate(up_types)]
    gate_up = torch.cat(parts, 1)
    back = matrices(down, down_type, gate_up.shape[1] // 2)
    routed = ids, weights, activation, stream
    return _experts(_normed(x, norm, eps), gate_up, up_bias, back, down_bias, *routed)


ROWS = [
    pytest.param(case, naive, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for cases, naive in ((dense.CASES, naive_dense), (planes.CASES, naive_planes))
    for case in cases
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("case", "naive", "dtype"), ROWS)
def test_experts_match_the_formula(case: Case, naive, dtype: torch.dtype, check_results) -> None:
    want = naive(*case.build(dtype, CPU))
    for fn in (case.op, case.reference):
        check_results(case, results(case, fn, case.build(dtype, CPU)), want, dtype)


def naive_route(
    logits: Tensor,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_best: int,
    jitter: float,
) -> tuple[Tensor, Tensor]:
    """One token and one expert at a time, with sorted lists."""
    ids, weights = [], []
    for row in logits.double().tolist():
        chosen, values = [], []
        if scoring == "sparsemixer":
            for _ in range(top_k):
                left = {i: s for i, s in enumerate(row) if i not in chosen}
                best = max(left, key=lambda i: left[i])
                top = left[best]
                near = [s for s in left.values() if (top - s) / max(abs(s), top) <= 2 * jitter]
                chosen.append(best)
                values.append(1 / sum(math.exp(s - top) for s in near))
        else:
            scores = row
            if scoring == "softmax":
                total = sum(math.exp(s) for s in row)
                scores = [math.exp(s) / total for s in row]
            elif scoring == "sigmoid":
                scores = [1 / (1 + math.exp(-s)) for s in row]
            added = [0.0] * len(row) if correction is None else correction.tolist()
            choice = [s + a for s, a in zip(scores, added, strict=True)]
            size = len(row) // groups
            worth = [
                sum(sorted(choice[g * size : (g + 1) * size])[-group_best:]) for g in range(groups)
            ]
            kept = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
            open_to = [i for i in range(len(row)) if i // size in kept]
            chosen = sorted(open_to, key=lambda i: -choice[i])[:top_k]
            values = [scores[i] for i in chosen]
            if scoring == "top_softmax":
                total = sum(math.exp(v) for v in values)
                values = [math.exp(v) / total for v in values]
            elif scoring == "top_sigmoid":
                values = [1 / (1 + math.exp(-v)) for v in values]
        if renormalize:
            values = [v / sum(values) for v in values]
        ids.append(chosen)
        weights.append([v * scale for v in values])
    shape = (len(ids), top_k)
    return torch.tensor(ids).int().view(shape), torch.tensor(weights).float().view(shape)


@pytest.mark.parametrize("case", route.CASES, ids=lambda case: case.name)
def test_routes_match_the_formula(case: Case, check_results) -> None:
    want = naive_route(*case.build(torch.float32, CPU))
    for fn in (case.op, case.reference):
        check_results(case, results(case, fn, case.build(torch.float32, CPU)), want)


def check_tiles(tiles: Tiles, ids: Tensor) -> None:
    """Every pair is at one place, in a tile of its expert, and knows it."""
    pairs, seen = ids.flatten().tolist(), []
    order, places = tiles.order.tolist(), tiles.places.tolist()
    for tile, (expert, rows) in enumerate(
        zip(tiles.experts.tolist(), tiles.rows.tolist(), strict=True)
    ):
        for place in range(tile * tiles.block, tile * tiles.block + rows):
            assert pairs[order[place]] == expert
            assert places[order[place]] == place
            seen.append(order[place])
    assert sorted(seen) == list(range(len(pairs)))


SORTS = ((1, 8, 128, 8), (5, 2, 8, 16), (64, 8, 128, 16), (700, 8, 60, 64), (1, 1, 4, 8))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "top_k", "experts", "block"), SORTS)
def test_sorting_on_a_gpu(tokens: int, top_k: int, experts: int, block: int) -> None:
    ids, _ = dense.random_routing(tokens, experts, top_k, torch.device("cuda"))
    check_tiles(sort_pairs(ids, experts, block), ids)


def test_a_tile_has_room_for_twice_an_even_share() -> None:
    assert [block_for(pairs, 128) for pairs in (8, 64, 512, 1024, 4096, 65536)] == [
        16, 16, 16, 16, 64, 128,
    ]  # fmt: skip
