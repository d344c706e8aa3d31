"""Timed runs of an engine, by the method of ``bench/peers.json``.

Prompts are random token ids, decoding is greedy, the end of a text is ignored. Prefill is one
prompt's tokens over the time to its first new token. Decode is the time of N + 1 new tokens less
that of one, over N, each the best of some repeats after a warm-up. Offline is all requests' new
tokens over the time from the first request to the last token.
"""

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from squall.bench import peers
from squall.bench.machine import Ceilings, decode_floor_s, prefill_floor_s
from squall.kernels.backends.device import backend_of
from squall.runtime.engine import Engine
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, TokenEvent


class BenchError(Exception):
    """A run that cannot be measured; the message is one line."""


class Load(NamedTuple):
    """``requests`` prompts of ``prompt`` tokens with ``output`` new tokens each."""

    requests: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Row:
    """One measured figure, tokens per second over the whole batch."""

    what: str  # "prefill", "decode" or "offline"
    batch: int
    prompt: int
    tok_s: float
    floor_tok_s: float
    peers: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """An engine and what its figures are compared with."""

    engine: Engine
    ceilings: Ceilings
    peer_case: str | None
    repeats: int

    def prefill(self, prompt: int) -> Row:
        # other prompts every time: none may come out of a prefix cache
        times = [run_load(self.engine, Load(1, prompt, 1), turn) for turn in range(self.repeats)]
        floor = prefill_floor_s(self.engine.model, prompt, self.ceilings)
        figures = peers.rate(self.peer_case, "prefill", 1, prompt)
        return Row("prefill", 1, prompt, prompt / min(times), prompt / floor, figures)

    def decode(self, batch: int, prompt: int, output: int) -> Row:
        run_load(self.engine, Load(batch, prompt, 2), seed=-1)
        first = whole = float("inf")
        for turn in range(2 * self.repeats):
            first = min(first, run_load(self.engine, Load(batch, prompt, 1), 2 * turn))
            whole = min(whole, run_load(self.engine, Load(batch, prompt, output + 1), 2 * turn + 1))
            if turn + 1 >= self.repeats and whole > first:
                break
        else:
            raise BenchError(f"{output} new tokens take no longer than one: decode more of them")
        seconds = (whole - first) / output
        floor = decode_floor_s(self.engine.model, batch, prompt + output // 2, self.ceilings)
        figures = peers.rate(self.peer_case, "decode", batch, prompt)
        return Row("decode", batch, prompt, batch / seconds, batch / floor, figures)

    def offline(self, load: Load) -> Row:
        """Measured once: it is long. The floor is every prompt's prefill, and decode steps of as
        many sequences as the engine runs at a time."""
        requests, prompt, output = load
        run_load(self.engine, Load(min(requests, 8), prompt, 2), seed=-1)
        seconds = run_load(self.engine, load, seed=0)
        width = min(requests, self.engine.limits.max_seqs)
        model, ceilings = self.engine.model, self.ceilings
        floor = requests * prefill_floor_s(model, prompt, ceilings)
        one_step = decode_floor_s(model, width, prompt + output // 2, ceilings)
        floor += requests / width * output * one_step
        key = f"offline_{requests}x({prompt}+{output})_out_tok_s"
        figures = peers.figure(self.peer_case, key)
        tokens = requests * output
        return Row("offline", requests, prompt, tokens / seconds, tokens / floor, figures)


def make_requests(engine: Engine, load: Load, seed: int) -> list[EngineRequest]:
    draw = random.Random(seed)
    vocab = range(engine.model.config.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=load.output, ignore_eos=True)
    prompts = [draw.choices(vocab, k=load.prompt) for _ in range(load.requests)]
    return [EngineRequest(i, prompt, params, [], []) for i, prompt in enumerate(prompts)]


def add(engine: Engine, requests: Iterable[EngineRequest]) -> None:
    """Queue them. ``BenchError`` when one is refused."""
    for request in requests:
        refused = engine.add(request)
        if refused is not None:
            raise BenchError(str(refused.error))


def step(engine: Engine) -> list[TokenEvent]:
    """One step's events. ``BenchError`` when a request fails."""
    events = engine.step()
    for event in events:
        if event.error:
            raise BenchError(event.error)
    return events


def run_load(engine: Engine, load: Load, seed: int) -> float:
    """Seconds from the first request to the last token."""
    device = engine.model.device
    requests = make_requests(engine, load, seed)
    unfinished = len(requests)
    backend_of(device).synchronize(device)
    begin = time.perf_counter()
    add(engine, requests)
    while unfinished:
        unfinished -= sum(event.finish_reason is not None for event in step(engine))
    seconds = time.perf_counter() - begin
    drain(engine)
    return seconds


def drain(engine: Engine) -> None:
    """Until nothing is under way: the last token may have come while a step ran for nobody."""
    while not engine.idle:
        step(engine)
