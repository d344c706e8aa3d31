"""Gathering whole choices, for answers that are not streamed."""

import asyncio
from dataclasses import dataclass, field

from squall.runtime.output import Delta, Logprob
from squall.runtime.params import SamplingParams
from squall.server.backend import Backend
from squall.server.errors import ApiError
from squall.server.generations import Generations, Usage
from squall.server.state import ServerState


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Collector:
    """The ``Sink`` that waits for everything."""

    def __init__(self, count: int) -> None:
        self.choices = [Choice() for _ in range(count)]
        self._finished: asyncio.Future[Usage] = asyncio.get_running_loop().create_future()

    def delta(self, choice: int, delta: Delta) -> None:
        target = self.choices[choice]
        if delta.text:
            target.texts.append(delta.text)
        target.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            target.finish_reason = delta.finish_reason

    def done(self, usage: Usage) -> None:
        if not self._finished.done():
            self._finished.set_result(usage)

    def failed(self, error: ApiError) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    async def wait(self) -> Usage:
        """The usage, once every choice is complete. Raises what generation failed with."""
        return await self._finished


async def collect(
    state: ServerState,
    backend: Backend,
    prompts: list[list[int]],
    params: SamplingParams,
    prompt_field: str,
) -> tuple[list[Choice], Usage]:
    """Generate everything. Raises ApiError; stops generating when cancelled."""
    collector = Collector(len(prompts) * params.n)
    generations = Generations(state, backend, collector, prompt_field)
    generations.start(prompts, params)
    try:
        return collector.choices, await collector.wait()
    finally:
        generations.cancel()
