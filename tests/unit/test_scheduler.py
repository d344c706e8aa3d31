"""The scheduler's rules, one at a time; ``test_scheduler_traces.py`` has the random traces."""

import subprocess
import sys

import pytest

from squall.runtime.pages import BlockPool
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, Sequence
from squall.runtime.scheduler import (
    Limits,
    Plan,
    QueueFullError,
    RequestTooLargeError,
    State,
    abort,
    add,
    apply,
    apply_results,
    finish,
    plan,
    slide,
)

EOS = 7


def request_of(
    number: int, prompt: int, max_tokens: int | None, *, priority: int = 0
) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return EngineRequest(number, [1] * prompt, params, [EOS], [], priority)


class Simulation:
    """Drives the scheduler as the engine does; every sampled token is 2."""

    def __init__(self, limits: Limits, num_blocks: int) -> None:
        self.limits = limits
        self.state = State(BlockPool(num_blocks))
        self.finished: list[int] = []  # request ids

    def add(self, request: EngineRequest) -> Sequence:
        return add(self.state, self.limits, request)

    def step(self) -> Plan:
        slide(self.state, self.limits)
        step = plan(self.state, self.limits)
        apply(self.state, step)
        for chunk in step.chunks:
            if chunk.samples and apply_results(self.state, chunk, 2) is not None:
                self.finished.append(chunk.seq.request.id)
        return step

    def run(self, bound: int) -> None:
        """To the end, within ``bound`` steps."""
        for _ in range(bound):
            if not self.state.idle:
                self.step()
        assert self.state.idle
        assert self.state.pool.used_blocks == 0


def limits_of(windows: tuple[int, ...] = (0,), **changes: int) -> Limits:
    values = {
        "max_seqs": 4,
        "token_budget": 16,
        "block_size": 4,
        "max_queue": 64,
        "max_seq_len": 64,
    }
    return Limits(**(values | changes), windows=windows)


@pytest.mark.parametrize(
    "name", ["max_seqs", "token_budget", "block_size", "max_queue", "max_seq_len"]
)
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        limits_of(**{name: 0})


def test_the_budget_has_room_for_all_decodes() -> None:
    with pytest.raises(ValueError, match=r"token_budget is 3; .* max_seqs \(4\)"):
        limits_of(token_budget=3)


def test_an_idle_state_has_an_empty_plan() -> None:
    assert plan(State(BlockPool(1)), limits_of()) == Plan()


def test_a_long_prompt_is_chunked_beside_decodes() -> None:
    sim = Simulation(limits_of(token_budget=8), 64)
    short, long = sim.add(request_of(0, 3, 9)), sim.add(request_of(1, 20, 2))
    waiting = sim.add(request_of(2, 4, 2))
    shapes = []
    for _ in range(4):
        step = sim.step()
        shapes.append([(c.seq, c.start, c.length, c.samples) for c in step.chunks])
    assert shapes == [
        [(short, 0, 3, True), (long, 0, 5, False)],
        [(short, 3, 1, True), (long, 5, 7, False)],
        [(short, 4, 1, True), (long, 12, 7, False)],
        [(short, 5, 1, True), (long, 19, 1, True), (waiting, 0, 4, True)],
    ]


def test_the_newest_is_preempted_and_resumes_with_its_output() -> None:
    sim = Simulation(limits_of(), 8)
    seqs = [sim.add(request_of(i, 7, 12)) for i in range(3)]
    sim.add(request_of(3, 30, 2))  # never fits beside the others
    victims: list[Sequence] = []
    while not sim.finished:
        step = sim.step()
        victims += step.preempted
        if step.preempted:
            assert [seq.arrival for seq in sim.state.waiting] == [*range(4)][-len(victims) - 1 :]
            assert step.preempted[0].output_ids
    assert victims == [seqs[2], seqs[1]]
    assert [seq.preemptions for seq in seqs] == [0, 1, 1]
    assert sim.state.preemptions == 2
    sim.run(80)
    assert sim.finished == [0, 1, 2, 3]


def test_the_last_in_order_waits_for_blocks_with_its_cache_kept() -> None:
    sim = Simulation(limits_of(), 5)
    old, new = sim.add(request_of(0, 7, 5)), sim.add(request_of(1, 7, 5))
    stalled = 0
    while not sim.finished:
        step = sim.step()
        stalled += len(step.chunks) == 1
    assert stalled == 3  # from its eighth token until the other had left
    assert (old.finish_reason, new.computed) == ("length", 8)
    sim.run(9)
    assert new.preemptions == 0


def test_after_a_preemption_nobody_starts_until_a_running_one_leaves() -> None:
    sim = Simulation(limits_of(), 8)
    for i in range(3):
        sim.add(request_of(i, 7, 12))
    while not sim.step().preempted:
        pass
    assert not sim.state.admitting
    while not sim.finished:
        assert not sim.step().admitted
    assert sim.state.admitting
    assert sim.step().admitted


def test_admission_leaves_a_block_per_running_sequence() -> None:
    sim = Simulation(limits_of(), 6)
    sim.add(request_of(0, 8, 9))  # two blocks now, a third in the next step
    sim.add(request_of(1, 13, 2))  # four, and none would be left
    assert [c.seq.request.id for c in sim.step().chunks] == [0]
    abort(sim.state, 1)
    sim.add(request_of(2, 8, 2))  # two of three
    assert [c.seq.request.id for c in sim.step().chunks] == [0, 2]


def test_a_prompt_starts_only_when_all_of_it_fits() -> None:
    sim = Simulation(limits_of(token_budget=4), 8)
    sim.add(request_of(0, 4, 10))
    sim.step()
    sim.add(request_of(1, 28, 2))  # its first chunk would fit
    while 0 in sim.state.by_id:
        assert [c.seq.request.id for c in sim.step().chunks] == [0]
    assert [c.seq.request.id for c in sim.step().chunks] == [1]


def test_nobody_overtakes_a_large_request() -> None:
    sim = Simulation(limits_of(), 8)
    first, large = sim.add(request_of(0, 12, 10)), sim.add(request_of(1, 20, 5))
    small = sim.add(request_of(2, 1, 1))
    while large in sim.state.waiting:
        assert sim.state.waiting[-1] is small
        sim.step()
    assert first.finish_reason == "length"
    sim.run(9)


def test_priority_comes_before_arrival() -> None:
    sim = Simulation(limits_of(max_seqs=1), 64)
    for i, priority in enumerate([0, 0, 5, 1, 5]):
        sim.add(request_of(i, 3, 2, priority=priority))
    sim.run(60)
    assert sim.finished == [2, 4, 3, 0, 1]


def test_a_pressing_request_takes_blocks_from_lesser_ones() -> None:
    sim = Simulation(limits_of(), 8)
    low = [sim.add(request_of(i, 6, 12)) for i in range(2)]
    sim.step()
    urgent = sim.add(request_of(9, 8, 20, priority=1))
    sim.run(120)
    assert urgent.preemptions == 0
    assert sum(seq.preemptions for seq in low) > 0


def test_the_queue_is_bounded() -> None:
    sim = Simulation(limits_of(max_seqs=1, max_queue=2), 64)
    for i in range(3):  # one will run, two wait
        sim.add(request_of(i, 3, 3))
    for _ in range(2):
        with pytest.raises(QueueFullError, match="the limit is 3 unfinished requests") as error:
            sim.add(request_of(3, 3, 3))
        assert error.value.limit == 3
        assert 3 not in sim.state.by_id
        sim.step()
    abort(sim.state, 1)
    sim.add(request_of(3, 3, 3))
    sim.run(9)
    assert sim.finished == [0, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "needs"), [(20, 2, 21), (3, 40, 42), (3, None, 63), (64, 1, 64)]
)
def test_what_could_never_fit_is_refused_with_both_numbers(
    prompt: int, max_tokens: int | None, needs: int
) -> None:
    sim = Simulation(limits_of(), 5)
    with pytest.raises(RequestTooLargeError, match=f"need {needs} tokens .* holds 20") as error:
        sim.add(request_of(0, prompt, max_tokens))
    assert (error.value.tokens, error.value.limit) == (needs, 20)
    assert sim.state.idle


def test_the_largest_request_that_fits_runs() -> None:
    sim = Simulation(limits_of(), 5)
    seq = sim.add(request_of(0, 3, 18))
    sim.run(20)
    assert (len(seq.output_ids), seq.preemptions) == (18, 0)


def test_a_prompt_may_fill_the_context_but_not_exceed_it() -> None:
    sim = Simulation(limits_of(), 64)
    full = sim.add(request_of(0, 64, None))
    half = sim.add(request_of(1, 40, None))
    with pytest.raises(RequestTooLargeError, match="has 65 tokens, the context length is 64"):
        sim.add(request_of(2, 65, 1))
    sim.run(60)
    assert [len(full.output_ids), len(half.output_ids)] == [1, 24]


def test_bad_requests_are_refused() -> None:
    sim = Simulation(limits_of(), 64)
    sim.add(request_of(0, 3, 3))
    with pytest.raises(ValueError, match="request id 0 is already in use"):
        sim.add(request_of(0, 3, 3))
    with pytest.raises(ValueError, match="request 1 has an empty prompt"):
        sim.add(request_of(1, 0, 3))


def test_stop_ids_end_a_sequence_and_are_no_output() -> None:
    params = SamplingParams(max_tokens=5, stop_token_ids=(3,))
    eos_too = Sequence(EngineRequest(0, [1], params, [EOS], []), 0, 6)
    assert [eos_too.accept(9), eos_too.accept(EOS)] == [None, "stop"]
    assert (eos_too.output_ids, eos_too.stop_token, eos_too.tokens) == ([9], EOS, [1, 9])
    params = SamplingParams(max_tokens=5, stop_token_ids=(3,), ignore_eos=True)
    ignoring = Sequence(EngineRequest(0, [1], params, [EOS], []), 0, 4)
    assert [ignoring.accept(EOS), ignoring.accept(3)] == [None, "stop"]
    assert (ignoring.output_ids, ignoring.stop_token) == ([EOS], 3)
    assert [ignoring.accept(8), ignoring.accept(8)] == [None, "length"]


def test_abort_frees_at_once_and_late_results_are_dropped() -> None:
    sim = Simulation(limits_of(), 16)
    running, waiting = sim.add(request_of(0, 6, 9)), sim.add(request_of(1, 6, 9))
    step = plan(sim.state, limits_of(max_seqs=1))
    apply(sim.state, step)
    assert abort(sim.state, 1) is waiting
    assert abort(sim.state, 0) is running
    assert abort(sim.state, 0) is None
    assert (sim.state.idle, sim.state.pool.used_blocks) == (True, 0)
    assert apply_results(sim.state, step.chunks[0], 5) is None
    assert (running.output_ids, running.finish_reason) == ([], "abort")
    with pytest.raises(AssertionError, match="is not alive"):
        finish(sim.state, running, "error")


def test_a_result_of_a_chunk_that_does_not_sample_is_refused() -> None:
    sim = Simulation(limits_of(token_budget=4), 16)
    sim.add(request_of(0, 6, 9))
    step = sim.step()
    with pytest.raises(AssertionError, match="does not sample"):
        apply_results(sim.state, step.chunks[0], 5)


def test_one_step_may_be_planned_before_the_last_is_booked() -> None:
    sim = Simulation(limits_of(), 16)
    seq = sim.add(request_of(0, 6, 2))
    first = plan(sim.state, sim.limits)
    apply(sim.state, first)
    assert (seq.in_flight, seq.remaining, seq.sampled) == (1, 1, 1)
    second = plan(sim.state, sim.limits)
    assert [(chunk.start, chunk.length, chunk.samples) for chunk in second.chunks] == [(6, 1, True)]
    apply(sim.state, second)
    assert plan(sim.state, sim.limits).chunks == ()  # both tokens it may have are in flight
    assert apply_results(sim.state, first.chunks[0], 4) is None
    assert apply_results(sim.state, second.chunks[0], 5) == "length"
    assert (seq.output_ids, sim.state.pool.used_blocks) == ([4, 5], 0)


def test_a_window_keeps_the_blocks_that_the_next_token_sees() -> None:
    sim = Simulation(limits_of((0, 6)), 64)
    seq = sim.add(request_of(0, 14, 8))
    held = []
    while not sim.state.idle:
        sim.step()
        held.append((len(seq.blocks[0]), seq.slid[1], seq.held))
    # computed: 14 in one step, which needs all; then token 14 sees 9..14, 16 sees 11..16, ...
    assert held[:4] == [(4, 0, 8), (4, 2, 6), (4, 2, 6), (5, 2, 8)]
    assert held[4:7] == [(5, 3, 7), (5, 3, 7), (5, 3, 7)]
    assert sim.state.pool.used_blocks == 0


def test_what_slid_out_is_marked_and_free_before_it_is_planned_with() -> None:
    sim = Simulation(limits_of((6,)), 3)
    seq = sim.add(request_of(0, 9, 50))
    sim.step()
    assert sim.state.pool.free_blocks == 0
    for _ in range(40):
        sim.step()
    assert (seq.preemptions, len(seq.output_ids)) == (0, 41)
    first = (seq.computed - 1 - 5) // 4
    assert seq.blocks[0][:first] == [-1] * first
    assert seq.held == len(seq.blocks[0]) - first <= 3


def test_a_windows_worth_of_blocks_is_enough_for_any_length() -> None:
    sim = Simulation(limits_of((0, 6), token_budget=64), 16 + 3)
    seq = sim.add(request_of(0, 40, None))
    lengths = []
    while not sim.state.idle:
        lengths += [chunk.length for chunk in sim.step().chunks]
    assert lengths[:2] == [36, 4]  # nine blocks in both groups, then seven are free again
    assert len(seq.output_ids) == 24
    with pytest.raises(RequestTooLargeError, match=r"need 63 tokens .* holds 60"):
        add(State(BlockPool(18)), sim.limits, request_of(0, 40, None))


def test_chunks_leave_others_the_blocks_that_come_back_only_after_the_step() -> None:
    sim = Simulation(limits_of((0, 4), token_budget=64), 24)
    for i in (1, 2):
        sim.add(request_of(i, 4, 12))
    sim.step()
    old = sim.add(request_of(0, 40, 4, priority=1))
    lengths = []
    while not sim.state.idle:
        lengths += [chunk.length for chunk in sim.step().chunks if chunk.seq is old]
    # 16, 9 and 7 blocks are free: two for each of the others stay so
    assert lengths[:3] == [24, 8, 4]
    assert sim.state.preemptions == 0


def test_pure_parts_do_not_import_torch() -> None:
    names = ("pages", "params", "request", "scheduler", "output")
    code = "".join(f"import squall.runtime.{name}\n" for name in names)
    code += "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
