"""top-k, top-p and the draw on weights, both implementations against a plain one."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from squall.runtime.filters import BLOCK, draw, keep_by_histogram, keep_prefix

INF = float("inf")


def plain_keep(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The definition: walk down the order, ties by id."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    limit = top_p * weights.sum()
    keep, before = np.zeros(len(weights), bool), 0.0
    for place, token in enumerate(order):
        assume(limit == INF or abs(before - limit) > 1e-9)  # a tie with rounding has no answer
        if place >= top_k or before >= limit:
            break
        keep[token] = True
        before += weights[token]
    return keep


def padded(rows: list[np.ndarray]) -> torch.Tensor:
    width = -(-max(len(r) for r in rows) // BLOCK) * BLOCK
    out = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row)
    return out


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


@st.composite
def batches(draw_: st.DrawFn) -> tuple[list[np.ndarray], list[int], list[float]]:
    vocab = draw_(st.integers(1, 40))
    count = draw_(st.integers(1, 4))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    spread = draw_(st.sampled_from([0.0, 0.5, 3.0, 40.0]))
    grid = draw_(st.sampled_from([0.0, 0.5]))  # a coarse grid makes ties
    logits = rng.normal(size=(count, vocab)) * spread
    if grid:
        logits = np.round(logits / grid) * grid
    weights = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float32)
    ks = [draw_(st.integers(1, vocab)) for _ in range(count)]
    ps = [draw_(st.one_of(st.floats(1e-6, 0.999999), st.just(INF))) for _ in range(count)]
    return list(weights), ks, ps


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans(), st.booleans())
def test_both_ways_keep_what_the_definition_keeps(
    batch: tuple[list[np.ndarray], list[int], list[float]], use_k: bool, use_p: bool
) -> None:
    weights, ks, ps = batch
    assume(use_k or use_p)
    vocab = len(weights[0])
    wanted = [
        plain_keep(w.astype(np.float64), k if use_k else vocab, p if use_p else INF)
        for w, k, p in zip(weights, ks, ps, strict=True)
    ]
    w = padded(weights)
    top_k = column([float(k) for k in ks]) if use_k else None
    top_p = column(ps) if use_p else None
    mass = w.sum(-1, keepdim=True, dtype=torch.float64) * top_p if top_p is not None else None
    for keep in (keep_prefix(w, top_k, top_p, vocab), keep_by_histogram(w, top_k, mass)):
        for got, want, row in zip(keep[:, :vocab], wanted, weights, strict=True):
            # Tokens of no weight are never drawn; whether they are kept means nothing.
            assert (got.numpy() & (row > 0)).tolist() == (want & (row > 0)).tolist()


@pytest.mark.parametrize("vocab", [4096, 50_000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_both_ways_agree_on_large_vocabularies(vocab: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(3, vocab, generator=generator) * scale).bfloat16().float()  # ties
    w = padded(list((logits - logits.amax(-1, keepdim=True)).exp().numpy()))
    top_k, top_p = column([5.0, float(vocab), 700.0]), column([0.9, 0.7, INF])
    mass = w.sum(-1, keepdim=True, dtype=torch.float64) * top_p
    assert torch.equal(
        keep_prefix(w, top_k, top_p, vocab) & (w > 0), keep_by_histogram(w, top_k, mass) & (w > 0)
    )
    assert keep_prefix(w, top_k, None, vocab).sum(-1).tolist() == [5, vocab, 700]


def test_draw_inverts_the_cumulative_distribution_in_id_order() -> None:
    weights = torch.zeros(1, 3 * BLOCK)
    weights[0, [0, 511, 512, 1100]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    steps = [(0.0, 0), (0.0999, 0), (0.1, 511), (0.2999, 511), (0.3, 512), (0.6, 1100)]
    for uniform, token in [*steps, (1 - 2**-52, 1100)]:
        u = torch.tensor([uniform], dtype=torch.float64)
        assert draw(weights, u).tolist() == [token], uniform


def test_draw_never_takes_a_token_without_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, 4 * BLOCK, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.99] = 0.0
    weights[:, -1] = 1e-30
    for uniform in (0.0, 1e-300, 0.5, 1 - 2**-52):
        ids = draw(weights, torch.full((64,), uniform, dtype=torch.float64))
        assert bool((weights.gather(1, ids.unsqueeze(1)) > 0).all())
