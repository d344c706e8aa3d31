"""Token counts and DRY."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.runtime.params import MAX_DRY_MATCH, SamplingParams
from squall.runtime.penalties import Dry, TokenCounts, penalise


class Owner:
    """Something that can own a row of counts."""


def plain_dry(
    tokens: list[int], params: SamplingParams, breakers: list[list[int]]
) -> dict[int, float]:
    """Every earlier place is compared with the end, token by token."""
    ends = [
        stop
        for breaker in breakers
        for stop in range(len(breaker), len(tokens) + 1)
        if tokens[stop - len(breaker) : stop] == breaker
    ]
    reach = min(len(tokens) - max(ends, default=0), MAX_DRY_MATCH)
    best: dict[int, int] = {}
    for place in range(1, len(tokens)):  # the token that followed
        size = 0
        while size < min(place, reach) and tokens[place - 1 - size] == tokens[-1 - size]:
            size += 1
        if size >= max(params.dry_allowed_length, 1):
            best[tokens[place]] = max(best.get(tokens[place], 0), size)
    scale, base, allowed = params.dry_multiplier, params.dry_base, params.dry_allowed_length
    return {token: scale * base ** (size - allowed) for token, size in best.items()}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=120),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
    st.integers(0, 4),
    st.data(),
)
def test_dry_equals_the_plain_one_at_every_step(
    tokens: list[int], breakers: list[list[int]], allowed: int, data: st.DataObject
) -> None:
    params = SamplingParams(dry_multiplier=0.7, dry_base=1.3, dry_allowed_length=allowed)
    dry = Dry(params, breakers)
    done = 0
    while done < len(tokens):
        step = data.draw(st.integers(1, len(tokens) - done))
        dry.extend(tokens[done : done + step])
        done += step
        assert dict(dry.penalties()) == pytest.approx(plain_dry(tokens[:done], params, breakers))


def test_dry_by_hand() -> None:
    params = SamplingParams(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=2)
    dry = Dry(params, [[9]])
    dry.extend([1, 2, 3, 4, 1, 2])
    assert dry.penalties() == [(3, 1.0)]  # "1 2" was followed by 3: 1 * 2 ** (2 - 2)
    dry.extend([3])
    assert dry.penalties() == [(4, 2.0)]
    dry.extend([9])
    assert dry.penalties() == []
    dry.extend([2, 3])
    assert dry.penalties() == [(4, 1.0), (9, 1.0)]
    dry.extend([9, 3])
    assert dry.penalties() == []  # "3" alone: too short, and the breaker stops it


def test_dry_caps_matches_and_penalties() -> None:
    params = SamplingParams(dry_multiplier=100.0, dry_base=10.0, dry_allowed_length=1)
    dry = Dry(params, [])
    dry.extend([5] * 500)
    assert dry.penalties() == [(5, 1e30)]
    dry = Dry(SamplingParams(dry_multiplier=1.0, dry_base=1.1, dry_allowed_length=2), [])
    dry.extend([5] * 500)
    assert dry.penalties() == [(5, pytest.approx(1.1 ** (MAX_DRY_MATCH - 2)))]


def test_counts_are_per_owner_and_ignore_foreign_ids() -> None:
    counts = TokenCounts(10, torch.device("cpu"))
    owners = [Owner() for _ in range(3)]
    slots = [counts.claim(owner) for owner in owners]
    counts.add([slots[0]] * 4 + [slots[2]] * 2, [1, 1, 3, 9, 1, 0])
    counts.add([slots[0], slots[1], slots[1]], [3, 10, -1])
    rows = counts.rows(torch.tensor(slots))
    assert rows[0].tolist() == [0, 2, 0, 2, 0, 0, 0, 0, 0, 1]
    assert not rows[1].any()
    assert rows[2].tolist() == [1, 1] + [0] * 8


def test_counts_return_to_the_pool_with_their_owner() -> None:
    counts = TokenCounts(100, torch.device("cpu"))
    assert counts.nbytes == 0
    for _ in range(5):
        owners = [Owner() for _ in range(4)]
        slots = [counts.claim(owner) for owner in owners]
        assert len(set(slots)) == 4
        assert not counts.rows(torch.tensor(slots)).any()
        counts.add(slots, [7] * 4)
        counts.trim()
        assert counts.used == 4
        del owners
        gc.collect()
        assert counts.used == 0
    assert counts.nbytes == 4 * 100 * 4
    counts.trim()
    assert counts.nbytes == 0
    survivor = Owner()
    assert not counts.row(counts.claim(survivor)).any()


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    counts = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32)
    one = torch.ones(1, 1)
    assert penalise(logits, counts, 2 * one, 0 * one, 0 * one).tolist() == [[1.0, -4.0, 2.0, 0.0]]
    assert penalise(logits, counts, one, 0.5 * one, 0.25 * one).tolist() == [
        [1.25, -3.25, 2.0, -1.75]
    ]
    both = penalise(logits, counts, 2 * one, 0.5 * one, -1 * one)
    assert both.tolist() == [[1.5, -4.0, 2.0, -0.5]]


def test_penalties_leave_masked_tokens_masked() -> None:
    logits = torch.tensor([[-np.inf, 1.0]])
    counts = torch.ones(1, 2, dtype=torch.int32)
    ones = torch.ones(1, 1)
    assert penalise(logits, counts, 2 * ones, 2 * ones, 2 * ones)[0, 0] == -np.inf
