"""The engine on a tiny random model: batching, chunking, preemption, cancelling and faults must
not change what a request gets. On a GPU with and without CUDA graphs, against the CPU's model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch

from squall.loaders.progress import NoProgress
from squall.models.batch import KVCache
from squall.models.config import DecoderConfig, LayerConfig, RopeConfig
from squall.models.decoder import Decoder
from squall.models.kv_layout import kv_layout
from squall.models.weights import RandomWeights
from squall.runtime.engine import Engine
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, TokenEvent
from squall.runtime.runner import Runner
from squall.runtime.scheduler import Limits
from squall.tools.logits import sequence_logits

VOCAB = 61
BLOCK = 8
CPU = torch.device("cpu")
PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((1, 5, 19, 33, 8, 14))]


class ScaledWeights(RandomWeights):
    """Random weights large enough that greedy continuations are not all alike."""

    def _normal(self, *shape: int) -> torch.Tensor:
        return super()._normal(*shape) * 12


class CPUWeights(ScaledWeights):
    """The numbers ``ScaledWeights`` has on a CPU, on any device."""

    def _normal(self, *shape: int) -> torch.Tensor:
        device, self.device = self.device, CPU
        x = super()._normal(*shape)
        self.device = device
        return x.to(device)


CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    norm_eps=1e-6,
    layers=(LayerConfig(), LayerConfig(window=12)),
    ropes=(RopeConfig(16),),
    tie_embeddings=False,
    attention_scale=16**-0.5,
)


def decoder(device: str) -> Decoder:
    source = CPUWeights(torch.float32, CPU)
    source.device = torch.device(device)
    return Decoder(CONFIG, source, 128)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder("cpu")


@dataclass(frozen=True)
class Place:
    """Where and how an engine runs; ``windows``: layers with a window keep only what they see."""

    device: str
    graphs: bool
    windows: bool


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Place("cpu", False, False), id="cpu"),
        pytest.param(Place("cpu", False, True), id="cpu-windows"),
        pytest.param(Place("cuda", False, True), id="gpu-eager", marks=pytest.mark.gpu),
        pytest.param(Place("cuda", True, False), id="gpu-graphs", marks=pytest.mark.gpu),
        pytest.param(Place("cuda", True, True), id="gpu-graphs-windows", marks=pytest.mark.gpu),
    ],
)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    return found


MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def make_engine(place: Place) -> MakeEngine:
    placed = decoder(place.device)

    def make(blocks: int = 200, budget: int = 64, seqs: int = 8) -> Engine:
        layers, shape = CONFIG.num_layers, CONFIG.kv_shape
        limits = Limits(seqs, budget, BLOCK, 100, 128)
        layout = kv_layout(CONFIG, 128)
        if place.windows:
            blocks += 3  # what the layer with a window needs at most
            layers, limits = layout.group_layers, replace(limits, windows=layout.windows)
        cache = KVCache.allocate(layers, blocks, BLOCK, shape, torch.float32, placed.device)
        for tensor in cache.keys + cache.values:
            tensor.fill_(float("nan"))  # whatever is read without having been written shows
        if place.windows:
            cache = cache.shared(layout.groups, layout.places)
        engine = Engine(placed, cache, limits)
        if place.graphs:
            engine.runner.capture(NoProgress())
        return engine

    return make


def request(i: int, prompt: list[int], **params: object) -> EngineRequest:
    settings = {"temperature": 0.0, "max_tokens": 20, **params}
    return EngineRequest(i, prompt, SamplingParams(**settings), [], [])


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    for _ in range(5000):
        if engine.idle:
            return events
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    raise AssertionError("the engine does not come to an end")


def run(engine: Engine, requests: Iterable[EngineRequest]) -> dict[int, list[int]]:
    for item in requests:
        assert engine.add(item) is None
    events = drain(engine)
    assert engine.state.pool.used_blocks == 0
    return {i: [t for event in found for t in event.token_ids] for i, found in events.items()}


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Without the engine: recompute the whole sequence for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(sequence_logits(model, ids, len(ids))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[int]]:
    return [greedy(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("blocks", "budget", "seqs"),
    [
        pytest.param(200, 64, 1, id="alone"),
        pytest.param(200, 512, 8, id="together"),
        pytest.param(200, 8, 8, id="chunked"),
        pytest.param(9, 64, 8, id="preempted"),
        pytest.param(7, 8, 4, id="chunked-and-preempted"),
    ],
)
def test_greedy_does_not_depend_on_scheduling(
    make_engine: MakeEngine, expected: list[list[int]], blocks: int, budget: int, seqs: int
) -> None:
    engine = make_engine(blocks, budget, seqs)
    found = run(engine, (request(i, prompt) for i, prompt in enumerate(PROMPTS)))
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert (engine.state.preemptions > 0) == (blocks < 10)


def test_a_seed_gives_the_same_text_in_any_company(make_engine: MakeEngine) -> None:
    wanted = {"temperature": 1.0, "top_p": 0.9, "seed": 1234, "presence_penalty": 0.5}
    alone = run(make_engine(), [request(0, PROMPTS[2], **wanted)])[0]
    others = [request(i + 1, p, temperature=1.3) for i, p in enumerate(PROMPTS)]
    crowd = run(make_engine(12), [*others[:3], request(0, PROMPTS[2], **wanted), *others[3:]])
    assert crowd[0] == alone
    assert run(make_engine(), [request(0, PROMPTS[2], **{**wanted, "seed": 5})])[0] != alone


def test_stop_ids_and_lengths(make_engine: MakeEngine, expected: list[list[int]]) -> None:
    engine = make_engine()
    stop = expected[1][4]
    cut = expected[1].index(stop)
    engine.add(request(0, PROMPTS[1], stop_token_ids=(stop,)))
    engine.add(EngineRequest(1, PROMPTS[1], SamplingParams(temperature=0.0), [stop], []))
    engine.add(request(2, PROMPTS[1], max_tokens=3))
    engine.add(EngineRequest(3, PROMPTS[3], SamplingParams(temperature=0.0), [], []))
    found = drain(engine)
    last = {i: events[-1] for i, events in found.items()}
    for i in (0, 1):
        assert (last[i].finish_reason, last[i].stop_token, last[i].token_ids) == ("stop", stop, [])
        assert [t for e in found[i] for t in e.token_ids] == expected[1][:cut]
    assert last[2].finish_reason == last[3].finish_reason == "length"
    assert sum(len(e.token_ids) for e in found[3]) == 128 - len(PROMPTS[3])  # the context is full


def test_logprobs_are_of_the_models_logits(
    model: Decoder, make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine()
    engine.add(request(0, PROMPTS[2], max_tokens=4, logprobs=3))
    events = drain(engine)[0]
    ids = PROMPTS[2] + expected[2][:4]
    reference = sequence_logits(model, ids, len(ids)).log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    for event, row in zip(events, reference, strict=True):
        assert event.logprobs is not None
        (entry,) = event.logprobs
        assert entry.token_id == event.token_ids[0]
        top = row.topk(3)
        assert [i for i, _ in entry.top] == top.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)


def test_abort_frees_within_one_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for i, prompt in enumerate(PROMPTS):
        engine.add(request(i, prompt))
    for _ in range(3):
        engine.step()
    for i in (0, 2, 5):
        event = engine.abort(i)
        assert event is not None
        assert event.finish_reason == "abort"
        assert engine.abort(i) is None
    events = drain(engine)
    assert set(events) == {1, 3, 4}
    assert engine.state.pool.used_blocks == 0


def test_a_failing_step_ends_its_requests_only(
    make_engine: MakeEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.add(request(0, PROMPTS[1]))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", lambda *args: 1 / 0)
        (event,) = engine.step()
    assert event.finish_reason == "error"
    assert event.error == "the step failed: ZeroDivisionError: division by zero"
    assert engine.state.pool.used_blocks == 0
    assert run(engine, [request(1, PROMPTS[1])])[1] == expected[1]


def test_nan_logits_fail_one_request(
    place: Place,
    make_engine: MakeEngine,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place.graphs:
        pytest.skip("a captured step does not call the patched method")
    engine = make_engine()
    plain = Decoder.logits

    def poisoned(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(self, hidden)
        if len(logits) > 1:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "logits", poisoned)
    engine.add(request(0, PROMPTS[1]))
    engine.add(request(1, PROMPTS[2]))
    events = drain(engine)
    assert events[0][-1].finish_reason == "error"
    assert [t for e in events[1] for t in e.token_ids] == expected[2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(0, []), "empty prompt"),
        (request(0, [VOCAB]), "prompt token ids must be in 0..60, found 61"),
        (request(0, [-1]), "found -1"),
        (request(0, [1] * 129), "the prompt has 129 tokens, the context length is 128"),
        (request(0, [1], temperature=float("nan")), "temperature is nan"),
        (request(0, [1], stop_token_ids=(VOCAB,)), "stop_token_ids"),
    ],
)
def test_impossible_requests_get_an_event(
    make_engine: MakeEngine, bad: EngineRequest, message: str
) -> None:
    engine = make_engine()
    event = engine.add(bad)
    assert event is not None
    assert event.finish_reason == "error"
    assert message in (event.error or "")
    assert engine.idle
