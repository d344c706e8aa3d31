"""Server-sent events: deltas become chunks as they come, merged while the client is behind."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from squall.runtime.output import Delta, Logprob
from squall.runtime.params import SamplingParams
from squall.server.backend import Backend
from squall.server.errors import ApiError
from squall.server.generations import Generations, Usage
from squall.server.messages import BodyWriter, StreamingResponse
from squall.server.state import ServerState

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
MAX_HELD_BYTES = 8 * 1024 * 1024  # of one response; a client further behind is dropped
LOGPROB_BYTES = 120  # about what one entry takes as JSON


class ChunkEncoder(Protocol):
    """Writes the events of one API; every method returns whole events."""

    def opening(self, choice: int) -> bytes:
        """What comes before the first delta of a choice; may be empty."""
        ...

    def delta(self, choice: int, text: str, logprobs: tuple[Logprob, ...]) -> bytes:
        """New text."""
        ...

    def finish(self, choice: int, reason: str) -> bytes:
        """The last event of a choice."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The event after all choices' last; empty when it was not asked for."""
        ...


@dataclass(slots=True)
class _Held:
    """What one choice has produced since the client fell behind."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None


class EventStream:
    """Both ends of a streaming answer: the ``Sink`` of its generations and the ``BodySource`` of
    its HTTP response."""

    __slots__ = (
        "_encoder",
        "_error",
        "_generations",
        "_held",
        "_held_bytes",
        "_interval",
        "_last_write",
        "_loop",
        "_opened",
        "_timer",
        "_usage",
        "_writer",
    )

    def __init__(self, encoder: ChunkEncoder, keep_alive_comment: float) -> None:
        self._encoder = encoder
        self._interval = keep_alive_comment
        self._loop = asyncio.get_running_loop()
        self._generations: Generations | None = None
        self._writer: BodyWriter | None = None
        self._opened: set[int] = set()
        self._held: dict[int, _Held] = {}
        self._held_bytes = 0
        self._usage: Usage | None = None  # set when all choices have finished
        self._error: ApiError | None = None
        self._last_write = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def bind(self, generations: Generations) -> None:
        """What to cancel when the client goes."""
        self._generations = generations

    # -- Sink --------------------------------------------------------------------------------

    def delta(self, choice: int, delta: Delta) -> None:
        writer = self._writer
        if writer is None or self._held or writer.paused:
            self._hold(choice, delta)
            return
        data = self._encode(choice, delta.text, delta.logprobs, delta.finish_reason)
        if data:
            self._write(writer, data)

    def done(self, usage: Usage) -> None:
        self._usage = usage
        self._end_if_due()

    def failed(self, error: ApiError) -> None:
        self._error = error
        self._end_if_due()

    # -- BodySource --------------------------------------------------------------------------

    def attach(self, writer: BodyWriter) -> None:
        self._writer = writer
        self._last_write = self._loop.time()
        self._timer = self._loop.call_later(self._interval, self._tick)
        self.resume()

    def resume(self) -> None:
        writer = self._writer
        if writer is not None and self._held:
            data = self._take_held()
            if data:
                self._write(writer, data)
        self._end_if_due()

    def abandon(self) -> None:
        self._detach()
        if self._generations is not None:
            self._generations.cancel()

    # -- inside ------------------------------------------------------------------------------

    def _encode(
        self, choice: int, text: str, logprobs: tuple[Logprob, ...], finish_reason: str | None
    ) -> bytes:
        """The events of one delta; ``b""`` when it shows nothing."""
        encoder = self._encoder
        data = encoder.delta(choice, text, logprobs) if text or logprobs else b""
        if finish_reason is not None:
            data += encoder.finish(choice, finish_reason)
        if data and choice not in self._opened:
            self._opened.add(choice)
            data = encoder.opening(choice) + data
        return data

    def _write(self, writer: BodyWriter, data: bytes) -> None:
        self._last_write = self._loop.time()
        writer.write(data)

    def _hold(self, choice: int, delta: Delta) -> None:
        held = self._held.setdefault(choice, _Held())
        held.texts.append(delta.text)
        held.logprobs += delta.logprobs
        held.finish_reason = delta.finish_reason
        self._held_bytes += len(delta.text.encode()) + sum(
            LOGPROB_BYTES * (1 + len(entry.top)) for entry in delta.logprobs
        )
        if self._held_bytes > MAX_HELD_BYTES and self._writer is not None:
            self._writer.abort()
            self.abandon()

    def _take_held(self) -> bytes:
        data = b"".join(
            self._encode(choice, "".join(held.texts), tuple(held.logprobs), held.finish_reason)
            for choice, held in sorted(self._held.items())
        )
        self._held.clear()
        self._held_bytes = 0
        return data

    def _end_if_due(self) -> None:
        """Write the end once it is known and everything before it has been taken."""
        writer = self._writer
        if writer is None:
            return
        if self._error is not None:
            writer.write(self._take_held() + b"data: %b\n\n" % self._error.body())
            self._detach()
            writer.finish(keep_alive=False)
        elif self._usage is not None and not self._held:
            writer.write(self._encoder.usage(self._usage) + DONE)
            self._detach()
            writer.finish()

    def _detach(self) -> None:
        self._writer = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        """Keep proxies from closing a connection on which nothing happens for long."""
        writer = self._writer
        if writer is None:
            return
        left = self._last_write + self._interval - self._loop.time()
        if left <= 0.0 and not writer.paused:
            self._write(writer, KEEP_ALIVE)
        self._timer = self._loop.call_later(left if left > 0.0 else self._interval, self._tick)


def stream(
    state: ServerState,
    backend: Backend,
    encoder: ChunkEncoder,
    prompts: list[list[int]],
    params: SamplingParams,
    prompt_field: str,
) -> StreamingResponse:
    """Start generating and return the response that streams it. Raises ApiError.

    The caller must return the response without awaiting anything more: until it is attached to
    its connection nobody would notice a disconnect.
    """
    events = EventStream(encoder, state.keep_alive_comment)
    generations = Generations(state, backend, events, prompt_field)
    events.bind(generations)
    generations.start(prompts, params)
    return StreamingResponse(events)
