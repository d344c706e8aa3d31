"""The sampler against a plain float64 one, row by row, and its promises about batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.runtime import sampler as sampler_module
from squall.runtime.params import SamplingParams
from squall.runtime.penalties import Dry
from squall.runtime.sampler import Sampler, SampleRow, demanding_rows

MASK = 2**64 - 1


def plain_uniform(seed: int, position: int) -> float:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    return (mix((mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 12) / 2**52


def plain_edit(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    p, x = row.params, logits.astype(np.float64)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    tokens = [*row.prompt_ids, *row.output_ids]
    if p.dry_multiplier:
        dry = Dry(p, row.dry_breaker_ids)
        dry.extend(tokens)
        for token, amount in dry.penalties():
            x[token] -= amount
    for token in set(tokens):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
        x[token] -= tokens.count(token) * p.frequency_penalty + p.presence_penalty
    return x


def plain_probabilities(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """Exact probabilities of the next token, for parameters that are not greedy."""
    p, x = row.params, plain_edit(logits, row)
    weights = np.exp((x - x.max()) / p.temperature)
    probs = weights / weights.sum()
    order = sorted(range(len(x)), key=lambda i: (-probs[i], i))
    keep, before = np.zeros(len(x), bool), 0.0
    for place, token in enumerate(order):
        if (p.top_k > 0 and place >= p.top_k) or (p.top_p < 1 and before >= p.top_p):
            break
        keep[token] = probs[token] >= p.min_p * probs.max()
        before += probs[token]
    kept = np.where(keep, probs, 0.0)
    return kept / kept.sum()


def plain_token(logits: np.ndarray, row: SampleRow) -> set[int]:
    """The token, or both neighbours if the draw lies on their border within rounding."""
    if row.params.temperature < 1e-7:
        x = plain_edit(logits, row)
        return set(np.flatnonzero(x >= x.max() - 1e-5).tolist())
    ends = plain_probabilities(logits, row).cumsum()
    u = plain_uniform(row.seed, len(row.output_ids))
    return {
        int(np.searchsorted(ends, v, side="right")) for v in (u - 1e-5, u, u + 1e-5) if v < ends[-1]
    }


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.4 else off

    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_k=int(maybe(rng.integers(1, vocab + 3), 0)),
        top_p=maybe(rng.uniform(0.05, 0.999), 1.0),
        min_p=maybe(rng.uniform(0, 1), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        dry_multiplier=maybe(rng.uniform(0.1, 2), 0.0),
        dry_allowed_length=int(rng.integers(1, 3)),
        logit_bias={int(rng.integers(vocab)): float(rng.uniform(-5, 5))}
        if rng.random() < 0.3
        else {},
        seed=int(rng.integers(2**63)),
        logprobs=int(rng.integers(0, 4)) if rng.random() < 0.3 else None,
    )


def make_row(rng: np.random.Generator, vocab: int, params: SamplingParams) -> SampleRow:
    prompt = rng.integers(0, vocab, size=rng.integers(1, 12)).tolist()
    output = rng.integers(0, vocab, size=rng.integers(0, 12)).tolist()
    return SampleRow(params, prompt, output, [[int(rng.integers(vocab))]])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 5))
def test_equals_the_plain_sampler_over_several_steps(seed: int, vocab: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    sampler = Sampler(vocab, "cpu")
    rows = [make_row(rng, vocab, random_params(rng, vocab)) for _ in range(count)]
    for _ in range(4):
        logits = rng.normal(size=(count, vocab)).astype(np.float32) * 3
        given_logits = torch.from_numpy(logits.copy())
        out = sampler.sample(given_logits, rows)
        assert torch.equal(given_logits, torch.from_numpy(logits))
        assert out.errors == {}
        for i, row in enumerate(rows):
            assert out.token_ids[i] in plain_token(logits[i], row), row
        for row, token in zip(rows, out.token_ids, strict=True):
            row.output_ids.append(token)
        if rng.random() < 0.3:  # a neighbour leaves, another comes
            rows[0] = make_row(rng, vocab, random_params(rng, vocab))


FILTERS = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "min_p with top_p": {"min_p": 0.3, "top_p": 0.99},
    "top_k and top_p": {"top_k": 3, "top_p": 0.7, "temperature": 1.3},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.4},
    "bias": {"logit_bias": {0: 3.0, 5: -100.0}},
    "dry": {"dry_multiplier": 1.5},
}


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_are_the_exact_probabilities(name: str) -> None:
    logits = torch.tensor([1.5, 0.2, -0.3, 2.0, 0.9, 1.0, -2.0, 0.0, 1.9])
    draws = 8000
    sampler = Sampler(9, "cpu")
    rows = [
        SampleRow(SamplingParams(seed=i, **FILTERS[name]), [1, 3, 3, 8], [4, 8, 1, 3])
        for i in range(draws)
    ]
    ids = sampler.sample(logits.expand(draws, 9), rows).token_ids
    probabilities = plain_probabilities(logits.numpy(), rows[0])
    observed = np.bincount(ids, minlength=9)
    assert (observed[probabilities == 0] == 0).all()
    expected = probabilities[probabilities > 0] * draws
    chi2 = (((observed[probabilities > 0] - expected) ** 2) / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_positions_of_one_request_draw_independently() -> None:
    sampler = Sampler(2, "cpu")
    row = SampleRow(SamplingParams(seed=3), [0], [])
    for _ in range(4000):
        row.output_ids += sampler.sample(torch.zeros(1, 2), [row]).token_ids
    bits = np.array(row.output_ids)
    assert abs(bits.mean() - 0.5) < 0.04
    for lag in (1, 2, 7, 64):
        assert abs((bits[lag:] == bits[:-lag]).mean() - 0.5) < 0.04


# Softmax of LADDER: 0.4, 0.3, 0.2, 0.1.
LADDER = [math.log(4.0), math.log(3.0), math.log(2.0), math.log(1.0)]
ORDER = [
    ({}, {0, 1, 2, 3}),
    ({"top_k": 2}, {0, 1}),
    ({"top_k": -1}, {0, 1, 2, 3}),
    ({"top_k": 99}, {0, 1, 2, 3}),
    ({"top_p": 0.39}, {0}),
    ({"top_p": 0.41}, {0, 1}),
    ({"top_p": 0.71}, {0, 1, 2}),
    ({"top_p": 1e-9}, {0}),
    # After top_k 2 a renormalised softmax would be 0.57, 0.43 and top_p 0.5 would keep one.
    ({"top_k": 2, "top_p": 0.5}, {0, 1}),
    ({"min_p": 0.5}, {0, 1, 2}),
    ({"min_p": 0.51}, {0, 1}),
    ({"min_p": 1.0}, {0}),
    ({"min_p": 0.6, "top_p": 0.95}, {0, 1}),
    # Temperature comes first: at 0.5 the probabilities are 16, 9, 4, 1 of 30.
    ({"temperature": 0.5, "top_p": 0.54}, {0, 1}),
    ({"temperature": 0.5, "min_p": 0.5}, {0, 1}),
    # The penalty comes before the filters: 0 and 1 become less likely than 2.
    ({"presence_penalty": 2.0, "top_k": 2}, {2, 3}),
    ({"logit_bias": {3: 5.0}, "top_k": 1}, {3}),
    # Bias before the repetition penalty: (log 4 - 3) is negative, so 2 multiplies it.
    ({"logit_bias": {0: -3.0}, "repetition_penalty": 2.0, "top_k": 3}, {1, 2, 3}),
    ({"top_k": 1}, {0}),
]


@pytest.mark.parametrize(("values", "possible"), ORDER, ids=str)
def test_order_of_operations(values: dict, possible: set[int]) -> None:
    rows = [SampleRow(SamplingParams(seed=i, **values), [0], [1]) for i in range(400)]
    ids = Sampler(4, "cpu").sample(torch.tensor(LADDER).expand(400, 4), rows).token_ids
    assert set(ids) == possible


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 1000)
    sampler = Sampler(1000, "cpu")
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=1, seed=5)):
        assert sampler.sample(logits, [SampleRow(params, [0], [])]).token_ids == [0]
    rows = [SampleRow(SamplingParams(top_k=3, seed=i), [0], []) for i in range(200)]
    assert set(sampler.sample(logits.expand(200, 1000), rows).token_ids) == {0, 1, 2}


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_seeded_request_does_not_notice_its_neighbours(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 777
    rng = np.random.default_rng(0)
    params = [random_params(rng, vocab) for _ in range(12)]
    prompts = [rng.integers(0, vocab, 5).tolist() for _ in params]
    logits = torch.from_numpy(rng.normal(size=(6, 12, vocab)).astype(np.float32) * 2)

    def run(indices: list[int]) -> dict[int, list[int]]:
        sampler = Sampler(vocab, "cpu")
        rows = {i: SampleRow(params[i], prompts[i], []) for i in indices}
        for step in range(6):
            out = sampler.sample(logits[step, indices], [rows[i] for i in indices])
            for i, token in zip(indices, out.token_ids, strict=True):
                rows[i].output_ids.append(token)
        return {i: rows[i].output_ids for i in indices}

    alone = {i: run([i])[i] for i in range(12)}
    monkeypatch.setattr(sampler_module, "CHUNK_ELEMENTS", chunk * vocab)
    assert run(list(range(12))) == alone
    assert run([7, 2, 11, 0, 5]) == {i: alone[i] for i in (7, 2, 11, 0, 5)}


def test_a_request_continues_after_its_row_was_made_anew() -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(seed=1, repetition_penalty=1.3, frequency_penalty=0.2, dry_multiplier=1)
    logits = torch.from_numpy(rng.normal(size=(30, 1, 50)).astype(np.float32))
    outputs = []
    for renew in (False, True):
        sampler = Sampler(50, "cpu")
        row = SampleRow(params, [1, 2, 3], [])
        for step in logits:
            if renew:
                row = SampleRow(params, [1, 2, 3], row.output_ids)
            row.output_ids += sampler.sample(step, [row]).token_ids
        outputs.append(row.output_ids)
        assert sampler.counts.used == 1
    assert outputs[0] == outputs[1]


def test_unseeded_requests_differ() -> None:
    rows = [SampleRow(SamplingParams(), [0], []) for _ in range(50)]
    assert len({row.seed for row in rows}) == 50
    ids = Sampler(10_000, "cpu").sample(torch.zeros(50, 10_000), rows).token_ids
    assert len(set(ids)) > 40
    assert SampleRow(SamplingParams(seed=-1), [0], []).seed == 2**64 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.9)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
def test_bad_logits_fail_their_row_only(
    dtype: torch.dtype, params: SamplingParams, poison: float | None
) -> None:
    logits = torch.full((3, 20), -5.0, dtype=dtype)
    logits[:, 4] = 50.0
    if poison is None:
        logits[1] = -torch.inf
    else:
        logits[1, 17] = poison
    for others in (params, SamplingParams(logprobs=2, repetition_penalty=1.1, top_k=3)):
        rows = [SampleRow(p, [0], []) for p in (others, params, others)]
        out = Sampler(20, "cpu").sample(logits, rows)
        assert out.token_ids == [4, -1, 4]
        assert list(out.errors) == [1]
        assert "not finite" in out.errors[1]
        if out.logprobs is not None:
            assert out.logprobs[1] is None


EXTREMES = [
    SamplingParams(temperature=1e-8),
    SamplingParams(temperature=1e-7),
    SamplingParams(temperature=1e-6, top_p=0.9, min_p=0.1),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-30),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=100.0, top_k=1, min_p=1.0, top_p=0.01),
]


@pytest.mark.parametrize("params", EXTREMES, ids=range(len(EXTREMES)))
def test_extreme_parameters_pick_the_best(params: SamplingParams) -> None:
    logits = torch.linspace(-3e4, 3e4, 600).flip(0).expand(50, 600).clone()
    logits[:, 77] = 60_000.0
    rows = [SampleRow(params, [0], []) for _ in range(50)]
    assert set(Sampler(600, "cpu").sample(logits, rows).token_ids) == {77}


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513])
def test_one_possible_token(vocab: int) -> None:
    sampler = Sampler(vocab, "cpu")
    logits = torch.full((1, vocab), -torch.inf)
    logits[0, vocab - 1] = -7.0
    for params in (SamplingParams(), SamplingParams(top_k=5, top_p=0.5, logprobs=20)):
        out = sampler.sample(logits, [SampleRow(params, [0], [])])
        assert out.token_ids == [vocab - 1]
        if out.logprobs:
            entry = out.logprobs[0]
            assert entry is not None
            assert entry.logprob == 0.0
            assert entry.top[0] == (vocab - 1, 0.0)
            assert [p for _, p in entry.top[1:]] == [-math.inf] * (min(20, vocab) - 1)


def test_bias_can_ban_and_force() -> None:
    sampler = Sampler(3, "cpu")
    for temperature in (0.0, 1.0):
        ban = SamplingParams(temperature=temperature, logit_bias={0: -100.0, 1: -100.0})
        force = SamplingParams(temperature=temperature, logit_bias={1: 100.0})
        rows = [SampleRow(ban, [0], []), SampleRow(force, [0], [])]
        assert sampler.sample(torch.tensor([[5.0, 4.0, 3.0]]).expand(2, 3), rows).token_ids == [
            2,
            1,
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(4, 5000, generator=generator) * 5).to(dtype)
    want = torch.log_softmax(logits.double(), -1)
    params = [
        SamplingParams(temperature=0, logprobs=5),
        SamplingParams(temperature=2.0, top_k=3, logit_bias={9: 50.0}, logprobs=0),
        SamplingParams(),
        SamplingParams(repetition_penalty=2.0, logprobs=20),
    ]
    rows = [SampleRow(p, [1], []) for p in params]
    out = Sampler(5000, "cpu").sample(logits, rows)
    assert out.logprobs is not None
    assert out.logprobs[2] is None
    for i in (0, 1, 3):
        entry = out.logprobs[i]
        assert entry is not None
        assert entry.token_id == out.token_ids[i]
        assert entry.logprob == pytest.approx(want[i, entry.token_id].item(), abs=2e-5)
        order = sorted(range(5000), key=lambda t: (-want[i, t].item(), t))
        count = params[i].logprobs
        assert [token for token, _ in entry.top] == order[:count]
        assert [p for _, p in entry.top] == pytest.approx(want[i, order[:count]].tolist(), abs=2e-5)
    assert out.logprobs[0].top[0][0] == out.token_ids[0]
    assert out.token_ids[1] == 9


def test_no_logprobs_unless_asked_for() -> None:
    rows = [SampleRow(SamplingParams(temperature=t), [0], []) for t in (0.0, 1.0)]
    assert Sampler(8, "cpu").sample(torch.zeros(2, 8), rows).logprobs is None


def test_idle_sampler_returns_its_memory() -> None:
    sampler = Sampler(64, "cpu")
    rows = demanding_rows(5, 64)
    assert sampler.sample(torch.randn(5, 64), rows).errors == {}
    assert sampler.counts.nbytes >= 5 * 64 * 4
    del rows
    sampler.release()
    assert sampler.counts.nbytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_tokens_of_the_cpu() -> None:
    vocab, count = 32_000, 24
    rng = np.random.default_rng(5)
    params = [random_params(rng, vocab) for _ in range(count)]
    prompts = [rng.integers(0, vocab, 40).tolist() for _ in params]
    outputs = []
    for device in ("cpu", "cuda"):
        logits = torch.from_numpy(np.random.default_rng(6).normal(size=(10, count, vocab))) * 4
        sampler = Sampler(vocab, device)
        rows = [SampleRow(p, ids, []) for p, ids in zip(params, prompts, strict=True)]
        for step in logits.float():
            out = sampler.sample(step.to(device), rows)
            for row, token in zip(rows, out.token_ids, strict=True):
                row.output_ids.append(token)
        outputs.append([row.output_ids for row in rows])
    assert outputs[0] == outputs[1]
