"""Random traces through the scheduler, against a simulated model and a simulated paged cache.

The next token is a hash of everything that the sequence sees in its blocks, so a token that was
computed out of order, twice, not at all, or overwritten through a shared block changes the output.
"""

import random
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.runtime.pages import BlockPool, blocks_for, blocks_needed
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, Sequence
from squall.runtime.scheduler import (
    Chunk,
    Limits,
    Plan,
    QueueFullError,
    RequestTooLargeError,
    State,
    abort,
    add,
    apply,
    apply_results,
    plan,
    slide,
)

VOCAB = 40
EOS = 7


def next_token(tokens: Iterable[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def seen(tokens: list[int], windows: tuple[int, ...]) -> list[int]:
    """What the newest token sees: in every group of layers all tokens, or the last of them."""
    newest = len(tokens) - 1
    return [token for window in windows for token in tokens[first_seen(newest, window) :]]


def first_seen(position: int, window: int) -> int:
    """The first token that the one at ``position`` sees, its own chunk's where that is limited."""
    if window < 0:
        return position // -window * -window
    return max(0, position - window + 1) if window else 0


def expected_output(request: EngineRequest, limits: Limits) -> list[int]:
    """What the simulated model generates when nobody else is there."""
    tokens = list(request.prompt_ids)
    room = max(1, limits.max_seq_len - len(tokens))
    stops = () if request.params.ignore_eos else request.eos_ids
    for _ in range(min(request.params.max_tokens or room, room)):
        token = next_token(seen(tokens, limits.windows))
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(request.prompt_ids) :]


def request_of(number: int, prompt: int, max_tokens: int | None, priority: int) -> EngineRequest:
    ids = random.Random(number).choices(range(VOCAB), k=prompt)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=number % 3 > 0)
    return EngineRequest(number, ids, params, [EOS], [], priority)


def snapshot(state: State) -> object:
    """All of the state, by value."""
    sequences = {
        key: [
            (name, list(value) if isinstance(value := getattr(seq, name), list) else value)
            for name in Sequence.__slots__
        ]
        for key, seq in state.by_id.items()
    }
    pool = state.pool
    return (
        sequences,
        [[list(table) for table in seq.blocks] for seq in state.running],
        [seq.request.id for seq in state.waiting],
        [seq.request.id for seq in state.running],
        (list(pool._free), bytes(pool._used)),
        (state.admitting, state.arrivals, state.preemptions),
    )


class Simulation:
    """Drives the scheduler as the engine does and checks every step."""

    def __init__(
        self, limits: Limits, num_blocks: int, *, fifo: bool = True, ahead: bool = False
    ) -> None:
        """``fifo``: all requests will have one priority, so the bounds are stricter. ``ahead``: a
        step's tokens are booked once the next step has been launched."""
        self.limits = limits
        self.fifo = fifo
        self.ahead = ahead
        self.launched: list[tuple[Chunk, int]] = []  # sampled chunks not booked yet
        self.state = State(BlockPool(num_blocks))
        self.memory = [-1] * (num_blocks * limits.block_size)
        self.finished: dict[int, Sequence] = {}
        self.due: dict[int, int] = {}  # request id -> the step it must have finished in
        self.next_start: dict[int, int] = {}
        self.steps = 0
        self.computed = 0

    def add(self, request: EngineRequest) -> Sequence | None:
        """None when it is refused, which changes nothing."""
        before = snapshot(self.state)
        try:
            seq = add(self.state, self.limits, request)
        except (QueueFullError, RequestTooLargeError):
            assert snapshot(self.state) == before
            return None
        # The oldest of one priority computes a token in every step and is never preempted.
        ahead = sum(other.max_length for other in self.state.by_id.values())
        self.due[request.id] = self.steps + ahead
        self.next_start[request.id] = 0
        return seq

    def abort(self, request_id: int) -> None:
        seq = abort(self.state, request_id)
        self.check_blocks()
        if seq is not None:
            expected = expected_output(seq.request, self.limits)
            assert seq.output_ids == expected[: len(seq.output_ids)]

    def step(self) -> Plan:
        slide(self.state, self.limits)
        self.check_slid()
        before = snapshot(self.state)
        step = plan(self.state, self.limits)
        assert snapshot(self.state) == before
        self.check_plan(step)
        outputs = {seq: list(seq.output_ids) for seq in step.preempted}
        apply(self.state, step)
        for seq, output in outputs.items():
            assert seq.output_ids == output
            assert (seq.computed, seq.blocks) == (0, [[] for _ in self.limits.windows])
            self.next_start[seq.request.id] = 0
        self.check_blocks()
        samples = [self.compute(chunk.seq, chunk.start, chunk.length) for chunk in step.chunks]
        sampled = [pair for pair in zip(step.chunks, samples, strict=True) if pair[0].samples]
        if not self.ahead:
            self.book(sampled)
        else:
            before_last, self.launched = self.launched, sampled
            self.book(before_last)
        self.check_blocks()
        self.steps += 1
        self.computed += step.tokens
        return step

    def book(self, sampled: list[tuple[Chunk, int]]) -> None:
        for chunk, token in sampled:
            if apply_results(self.state, chunk, token) is not None:
                self.finished[chunk.seq.request.id] = chunk.seq
                late = self.steps - self.ahead
                assert not self.fifo or late < self.due[chunk.seq.request.id]

    def token(self, seq: Sequence, position: int) -> int:
        """A token of the sequence, from the last step's samples if the host does not know it."""
        if position < len(seq.tokens):
            return seq.tokens[position]
        return next(token for chunk, token in self.launched if chunk.seq is seq)

    def compute(self, seq: Sequence, start: int, length: int) -> int:
        """Store the chunk in all groups; each of its tokens then looks back as far as it sees.
        Returns what the last one saw."""
        assert start == self.next_start[seq.request.id]
        self.next_start[seq.request.id] = start + length
        size, end = self.limits.block_size, start + length
        tokens = [self.token(seq, i) for i in range(end)]
        last: list[int] = []
        for table, window in zip(seq.blocks, self.limits.windows, strict=True):
            first = first_seen(start, window)
            slots = {i: table[i // size] * size + i % size for i in range(first, end)}
            assert min(slots.values()) >= 0  # no entry that slid out
            for i in range(start, end):
                self.memory[slots[i]] = tokens[i]
            assert [self.memory[slots[i]] for i in range(first, end)] == tokens[first:]
            last += [self.memory[slots[i]] for i in range(first_seen(end - 1, window), end)]
        return next_token(last)

    def check_plan(self, step: Plan) -> None:
        state, limits = self.state, self.limits
        assert step.chunks or self.launched or state.idle
        assert step.tokens <= limits.token_budget
        chunked = [chunk.seq for chunk in step.chunks]
        assert len(set(chunked)) == len(chunked)
        assert not set(chunked) & set(step.preempted)
        if state.running and state.running[0].remaining:
            assert state.running[0] in chunked  # the first always progresses
        kept = len(state.running) - len(step.preempted)
        assert list(step.preempted) == state.running[kept:][::-1]
        assert kept + len(step.admitted) <= limits.max_seqs
        assert not (step.admitted and step.preempted)
        kinds = []
        for chunk in step.chunks:
            assert chunk.start == chunk.seq.computed
            assert 1 <= chunk.length <= chunk.seq.remaining
            assert chunk.samples == (chunk.length == chunk.seq.remaining)
            is_new = chunk.seq in step.admitted
            kinds.append(2 if is_new else 0 if chunk.seq.remaining == 1 else 1)
        assert kinds == sorted(kinds)  # decodes, running prefills, admissions

    def check_blocks(self) -> None:
        state = self.state
        used = [
            block
            for seq in state.running
            for table, slid in zip(seq.blocks, seq.slid, strict=True)
            for block in table[slid:]
        ]
        assert len(set(used)) == len(used) == state.pool.used_blocks
        assert sum(seq.held for seq in state.running) == len(used)
        assert not any(seq.held or seq.blocks[0] or seq.computed for seq in state.waiting)
        assert len(state.running) <= self.limits.max_seqs
        waiting = [seq.order for seq in state.waiting]
        running = [seq.order for seq in state.running]
        assert waiting == sorted(waiting)
        assert running == sorted(running)
        if self.fifo and waiting and running:
            assert running[-1] < waiting[0]  # whoever runs is older than whoever waits
        assert len(state.running) + len(state.waiting) == len(state.by_id)
        for seq in state.running:
            size = self.limits.block_size
            for table, slid in zip(seq.blocks, seq.slid, strict=True):
                assert blocks_for(seq.computed, size) <= len(table) == len(seq.blocks[0])
                assert len(table) <= blocks_for(seq.max_length - 1, size)
                assert table[:slid] == [-1] * slid
                assert all(block >= 0 for block in table[slid:])

    def check_slid(self) -> None:
        """Nobody keeps more than the next token sees."""
        size, windows = self.limits.block_size, self.limits.windows
        self.check_blocks()
        for seq in self.state.running:
            first = [first_seen(seq.computed, w) // size for w in windows]
            assert seq.slid == first
            # one block more than tokens there are: growth comes after
            assert seq.held <= blocks_needed(seq.computed + 1, size, windows)

    def finish(self) -> dict[int, list[int]]:
        """Run to the end, within a bound, and return the outputs by request id."""
        alive = self.state.by_id.values()
        # The first of the running computes a token a step, and is set back at most once by each
        # request that is before it in order.
        bound = len(alive) * sum(seq.max_length for seq in alive)
        for _ in range(bound + self.ahead):
            if self.state.idle:
                break
            self.step()
        assert self.state.idle
        assert self.state.pool.used_blocks == 0
        for seq in self.finished.values():
            assert seq.output_ids == expected_output(seq.request, self.limits)
            assert seq.finish_reason == ("length" if seq.stop_token is None else "stop")
        return {number: seq.output_ids for number, seq in self.finished.items()}


# Mostly one group with full attention, as most models are.
WINDOWS = st.just((0,)) | st.lists(st.integers(-14, 14), min_size=1, max_size=3).map(tuple)


@st.composite
def limits_strategy(draw: st.DrawFn) -> Limits:
    max_seqs = draw(st.integers(1, 6))
    return Limits(
        max_seqs=max_seqs,
        token_budget=max_seqs + draw(st.integers(0, 12)),
        block_size=draw(st.integers(1, 5)),
        max_queue=draw(st.integers(1, 12)),
        max_seq_len=draw(st.integers(2, 40)),
        windows=draw(WINDOWS),
    )


ARRIVAL = st.tuples(st.integers(1, 24), st.none() | st.integers(1, 20), st.integers(-1, 1))
ABORT = st.integers(0, 50)
ACTIONS = st.lists(ARRIVAL | ABORT | st.none(), max_size=60)  # None: a step


@settings(max_examples=300, deadline=None)
@given(limits_strategy(), st.integers(1, 24), ACTIONS, st.booleans(), st.booleans())
def test_any_trace(
    limits: Limits,
    num_blocks: int,
    actions: list[tuple[int, int | None, int] | int | None],
    fifo: bool,
    ahead: bool,
) -> None:
    sim = Simulation(limits, num_blocks, fifo=fifo, ahead=ahead)
    accepted: set[int] = set()
    for number, action in enumerate(actions):
        if isinstance(action, int):
            sim.abort(action)
            accepted -= {action} - set(sim.finished)
        elif action is None:
            sim.step()
        else:
            prompt, max_tokens, priority = action
            request = request_of(number, prompt, max_tokens, 0 if fifo else priority)
            if sim.add(request) is not None:
                accepted.add(number)
    assert set(sim.finish()) == accepted


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_long_traces_with_a_tiny_pool(seed: int, fifo: bool, ahead: bool) -> None:
    long_trace(seed, (0,), fifo, ahead)


@pytest.mark.parametrize("windows", [(20,), (0, 7), (0, 12, 12, 5), (-20,), (-12, -12, 0)])
@pytest.mark.parametrize("seed", range(2))
def test_long_traces_with_windows(seed: int, windows: tuple[int, ...]) -> None:
    long_trace(seed, windows, fifo=seed > 0, ahead=True)


def long_trace(seed: int, windows: tuple[int, ...], fifo: bool, ahead: bool) -> None:
    rng = random.Random(seed)
    max_seqs = rng.randint(3, 12)
    limits = Limits(max_seqs, max_seqs + rng.randint(1, 20), rng.randint(1, 6), 40, 60, windows)
    fits_one = blocks_needed(59, limits.block_size, windows)
    sim = Simulation(limits, fits_one + rng.randint(0, 4), fifo=fifo, ahead=ahead)
    added: list[int] = []
    aborted: set[int] = set()
    for number in range(1500):
        if rng.random() < 0.12:
            wanted = rng.choice([None, 1, rng.randint(1, 40)])
            priority = 0 if fifo else rng.randint(0, 2)
            if sim.add(request_of(number, rng.randint(1, 40), wanted, priority)) is not None:
                added.append(number)
        if added and rng.random() < 0.01:
            victim = rng.choice(added)
            aborted |= {victim} - set(sim.finished)
            sim.abort(victim)
        if sim.state.by_id:
            sim.step()
    assert set(sim.finish()) == set(added) - aborted
    assert len(sim.finished) > 50
    assert sim.state.preemptions > (3 if any(windows) else 10)


@pytest.mark.parametrize(
    ("windows", "tiny"), [((0,), 14), ((0, 6), 18), ((20, 20), 14), ((-8, 0), 18)]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_pool_and_a_huge_one_give_the_same_output(
    seed: int, windows: tuple[int, ...], tiny: int
) -> None:
    rng = random.Random(seed)
    requests = [
        request_of(i, rng.randint(1, 30), rng.randint(1, 25), rng.randint(0, 1)) for i in range(40)
    ]
    outputs = []
    for num_blocks, budget in ((tiny, 9), (10_000, 4096)):
        limits = Limits(8, budget, 4, 40, 56, windows)
        sim = Simulation(limits, num_blocks, fifo=False, ahead=seed > 0)
        for request in requests:
            assert sim.add(request) is not None
        outputs.append(sim.finish())
        assert (sim.state.preemptions > 0) == (num_blocks == tiny)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 40


def test_four_times_too_many_requests_cost_little_recomputation() -> None:
    rng = random.Random(0)
    limits = Limits(max_seqs=64, token_budget=128, block_size=4, max_queue=400, max_seq_len=128)
    requests = [
        request_of(3 * i + 1, rng.randint(8, 64), rng.randint(16, 64), 0) for i in range(300)
    ]
    lengths = [len(r.prompt_ids) + (r.params.max_tokens or 0) - 1 for r in requests]
    average = sum(blocks_for(n, limits.block_size) for n in lengths) / len(lengths)
    sim = Simulation(limits, int(average * limits.max_seqs / 4))
    for request in requests:
        sim.add(request)
    sim.finish()
    assert sim.state.preemptions > 0
    assert sum(lengths) >= 0.85 * sim.computed
