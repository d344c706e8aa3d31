"""Sampling operators: the reference against a plain sampler, the engine's, and statistics."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from squall.kernels import sample, sample_counts
from squall.kernels.cases import Case
from squall.kernels.sample import count_tokens_, gather_ids, penalize_, sample_tokens_
from squall.runtime.params import GOLDEN, SamplingParams, mix64
from squall.runtime.penalties import TokenCounts, penalise
from squall.runtime.sampler import Sampler, SampleRow

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
OFF = (1.0, 0, 1.0, 0.0)  # temperature, top_k, top_p, min_p


def plain_sample(logits: Tensor, *parameters: Tensor) -> list[int]:
    """Row by row in float64, walking down the order."""
    rows = zip(logits.double().numpy(), *(p.tolist() for p in parameters), strict=True)
    return [_plain_row(*row) for row in rows]


def _plain_row(
    x: np.ndarray, temperature: float, k: int, p: float, min_p: float, key: int, position: int
) -> int:
    best = x.max()
    if not math.isfinite(best):
        return -1
    if temperature < 1e-7:
        return int(np.flatnonzero(x == best)[0])
    # Weights are float32 by definition: they decide what a tie is.
    weights = np.exp((x - best).astype(np.float32) / np.float32(temperature)).astype(np.float64)
    kept, before = np.zeros_like(weights), 0.0
    for place, token in enumerate(sorted(range(len(x)), key=lambda i: (-weights[i], i))):
        if (0 < k < len(x) and place >= k) or (p < 1 and before >= p * weights.sum()):
            break
        kept[token] = weights[token] if weights[token] >= min_p else 0.0
        before += weights[token]
    u = (mix64((key + (position + 1) * GOLDEN) % 2**64) >> 12) / 2**52
    return int(np.searchsorted(kept.cumsum(), u * kept.sum(), side="right"))


def sample_tokens(logits: Tensor, *values: Tensor) -> Tensor:
    ids = torch.full(logits.shape[:1], -7, dtype=torch.int32, device=logits.device)
    sample_tokens_(logits, *values, ids)
    return ids


SMALL = [case for case in sample.CASES if case.interpret and case.op is sample_tokens_]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_draws_what_a_plain_sampler_draws(case: Case) -> None:
    *args, _ids = case.build(torch.float32, CPU)
    before = [t.clone() for t in args]
    got = sample_tokens(*args)
    assert got.dtype == torch.int32
    assert got.tolist() == plain_sample(*args)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(args, before, strict=True)
    )


def _random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_k=int(maybe(rng.integers(1, vocab + 3), 0)),
        # Parameters that float32 holds: the engine's own sampler has them in float64.
        top_p=maybe(float(np.float32(rng.uniform(0.05, 0.999))), 1.0),
        min_p=maybe(float(np.float32(rng.uniform(0, 1))), 0.0),
        seed=int(rng.integers(2**63)),
    )


def _columns(rows: Sequence[SampleRow]) -> tuple[Tensor, ...]:
    params = [row.params for row in rows]
    keys = [mix64(row.seed) for row in rows]
    return (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor([k - 2**64 if k >= 2**63 else k for k in keys], dtype=torch.int64),
        torch.tensor([len(row.output_ids) for row in rows], dtype=torch.int32),
    )


@pytest.mark.parametrize("vocab", [1, 7, 63, 1000])
@pytest.mark.parametrize("scale", [0.5, 3.0, 10.0])
def test_reference_draws_what_the_engines_sampler_draws(vocab: int, scale: float) -> None:
    rng = np.random.default_rng(vocab)
    rows = [SampleRow(_random_params(rng, vocab), [0], []) for _ in range(60)]
    sampler = Sampler(vocab, "cpu")
    for step in range(4):
        x = torch.from_numpy(rng.normal(size=(len(rows), vocab)).astype(np.float32) * scale)
        if step % 2:
            x = x.round()  # ties
        x[step] = -torch.inf
        x[step + 4, 0] = torch.nan
        got = sample_tokens(x, *_columns(rows)).tolist()
        assert got == sampler.sample(x, rows).token_ids
        for row, token in zip(rows, got, strict=True):
            row.output_ids.append(token)


DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mix", [OFF, (0.7, 0, 1.0, 0.0), (1.0, 10, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1)]
)
def test_frequencies_are_the_probabilities(
    mix: tuple[float, int, float, float], device: torch.device
) -> None:
    """Chi-square over 20,000 draws of one distribution, by seed and by position."""
    vocab, draws = 40, 20_000
    x = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    *limits, _, _ = sample.parameters([mix], draws, device)
    row = torch.arange(draws)
    keys = torch.tensor([mix64(i) - 2**63 for i in range(100)]).repeat_interleave(draws // 100)
    positions = (row % (draws // 100)).int()
    logits = x.to(device).expand(draws, vocab)
    ids = sample_tokens(logits, *limits, keys.to(device), positions.to(device))
    temperature, k, p, min_p = mix
    probability = (x.double() / temperature).softmax(0)
    ordered, order = probability.sort(descending=True, stable=True)
    keep = (ordered.cumsum(0) - ordered < p) & (ordered >= min_p * ordered[0])
    keep &= torch.arange(vocab) < (k or vocab)
    want = torch.zeros_like(probability).scatter_(0, order, ordered * keep)
    expected = (want / want.sum() * draws).tolist()
    counts = Counter(ids.tolist())
    assert all(expected[token] > 0 for token in counts)
    statistic = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected) if e > 0)
    freedom = max(int(keep.sum()) - 1, 1)
    # Wilson and Hilferty's normal approximation, five standard deviations out.
    spread = 2 / (9 * freedom)
    assert (statistic / freedom) ** (1 / 3) < 1 - spread + 5 * math.sqrt(spread)


def test_negative_zero_ties_with_zero_and_infinities_are_unusable() -> None:
    nan, inf = math.nan, math.inf
    x = [[-0.0, 0.0], [-1.0, -0.0], [-inf, -5.0], [-inf, -inf], [nan, 1.0], [1.0, inf]]
    for mix, want in (((0.0, 0, 1.0, 0.0), [0, 1, 1, -1, -1, -1]), ((1.0, 1, 1.0, 0.0), None)):
        got = sample_tokens(torch.tensor(x), *sample.parameters([mix], len(x), CPU)).tolist()
        assert got == (want or [0, 1, 1, -1, -1, -1])


def test_penalize_equals_the_engines_formula() -> None:
    case = next(c for c in sample_counts.CASES if c.name == "penalize_-5x1000")
    logits, counts, slots, *penalties = case.build(torch.float32, CPU)
    want = logits.clone()
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[i] = penalise(logits[i], counts[slot], *(p[i] for p in penalties))
    penalize_(logits, counts, slots, *penalties)
    assert torch.allclose(logits, want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits, case.build(torch.float32, CPU)[0])
    nobody = torch.full_like(slots, -1)
    before = logits.clone()
    penalize_(logits, counts[:0], nobody, *penalties)  # no sequence has counts yet
    assert torch.equal(logits, before)


def test_count_tokens_equals_the_engines_counts() -> None:
    pool = TokenCounts(50, CPU)
    owners = [SampleRow(SamplingParams(), [], []) for _ in range(3)]
    claimed = [pool.claim(owner) for owner in owners]
    counts = torch.zeros(len(pool.pool), 50, dtype=torch.int32)
    slots = [claimed[0], -1, claimed[2], claimed[0], claimed[1]]
    ids = [7, 8, 49, 7, -1]
    pool.add([claimed[0], claimed[2], claimed[0]], [7, 49, 7])
    count_tokens_(
        counts, torch.tensor(slots, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32)
    )
    assert torch.equal(counts, pool.pool)
    assert counts[claimed[0], 7] == 2


def test_gather_ids_takes_sampled_and_known_tokens() -> None:
    sampled = torch.tensor([11, -1, 33], dtype=torch.int32)
    source = torch.tensor([2, -1, -8, 1, 0], dtype=torch.int32)
    got = gather_ids(sampled, source)
    assert got.tolist() == [33, 0, 7, 0, 11]
    assert got.dtype == torch.int32
    assert gather_ids(sampled[:0], source[1:2].long()).tolist() == [0]


FIRST = {c.op: c for c in reversed(sample.CASES + sample_counts.CASES) if c.interpret}


@pytest.mark.parametrize("case", FIRST.values(), ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(case.op, case.build(torch.float32, CPU), test_utils=tests)


def _assert_drawn(token: int, kept: Tensor, uniform: float) -> None:
    """``token`` is where ``uniform`` points to, within the rounding of sums in float32."""
    ends = kept.double().cumsum(0) / kept.double().sum()
    assert kept[token] > 0
    assert float(ends[token] - kept[token] / kept.double().sum()) - 3e-5 <= uniform
    assert uniform <= float(ends[token]) + 3e-5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", sample.SHAPES)
@pytest.mark.parametrize("vocab", [1000, 32_000, 128_256])
def test_gpu_draws_what_the_reference_draws(shape: str, vocab: int) -> None:
    """Exactly, but for the borders of tokens; and the same every time."""
    generator = torch.Generator().manual_seed(vocab)
    differing, total = 0, 0
    for rows in (1, 32, 167):
        x = sample.SHAPES[shape](torch.randn(rows, vocab, generator=generator) * 2)
        values = sample.parameters(sample.MIX, rows, CPU)
        want = sample_tokens(x, *values)
        on_gpu = [x.to(CUDA), *(v.to(CUDA) for v in values)]
        got = sample_tokens(*on_gpu)
        assert torch.equal(got, sample_tokens(*on_gpu)), "the same row fell differently"
        rows_apart = (got.cpu() != want).nonzero().flatten().tolist()
        uniforms = sample.uniforms_reference(*values[4:], torch.float64).tolist()
        for row in rows_apart:
            kept = sample.kept_reference(x[row, None], *(v[row, None] for v in values[:4]))[0]
            _assert_drawn(int(got[row]), kept, uniforms[row])
        differing += len(rows_apart)
        total += rows
    assert differing <= 0.1 * total


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_one_graph_serves_every_mix_of_requests(rows: int) -> None:
    vocab = 32_000
    x = torch.randn(rows, vocab, device=CUDA) * 4
    static = [t.clone() for t in sample.parameters([(0.0, 0, 1.0, 0.0)], rows, CUDA)]
    ids = torch.zeros(rows, dtype=torch.int32, device=CUDA)
    sample.sample_tokens_(x, *static, ids)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample.sample_tokens_(x, *static, ids)
    for first in range(len(sample.MIX)):
        mix = sample.MIX[first:] + sample.MIX[:first]
        for target, value in zip(static, sample.parameters(mix, rows, CUDA), strict=True):
            target.copy_(value)
        for _ in range(2):  # the counters are zero again
            ids.fill_(-5)
            graph.replay()
            assert torch.equal(ids, sample_tokens(x, *static))
