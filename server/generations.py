"""The generations behind one HTTP request: prompts x ``n`` choices, started and ended together."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import msgspec

from squall.runtime.frontend import (
    EmptyPrompt,
    EngineDead,
    Generation,
    PromptTooLong,
    QueueFull,
)
from squall.runtime.output import Delta
from squall.runtime.params import ParamError, SamplingParams
from squall.server.backend import Backend
from squall.server.errors import RATE_LIMIT, ApiError, unavailable
from squall.server.state import ServerState


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one HTTP request, over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Sink(Protocol):
    """Receives what is generated; after ``done`` or ``failed`` nothing more comes."""

    def delta(self, choice: int, delta: Delta) -> None:
        """News of choice ``prompt * n + index``."""
        ...

    def done(self, usage: Usage) -> None:
        """Every choice has finished."""
        ...

    def failed(self, error: ApiError) -> None:
        """Generation broke off; all choices are ended."""
        ...


class Generations:
    """Starts, counts and cancels."""

    def __init__(self, state: ServerState, backend: Backend, sink: Sink, prompt_field: str) -> None:
        """``prompt_field``: the request's field that errors about the prompt name."""
        self._state = state
        self._backend = backend
        self._sink = sink
        self._prompt_field = prompt_field
        self._started: list[Generation] = []
        self._unfinished = 0
        self._over = False

    def start(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Start them all, or none. Raises ApiError."""
        self._unfinished = len(prompts) * params.n
        try:
            for number, prompt_ids in enumerate(prompts):
                receive = partial(self._receive, number * params.n)
                self._started.append(self._backend.start(prompt_ids, params, receive))
        except Exception as error:
            self.cancel()
            raise as_api_error(error, self._prompt_field) from error
        self._state.running.add(self)

    def cancel(self) -> None:
        """Stop whatever is still running; the sink hears nothing more. Idempotent."""
        if not self._over:
            self._over = True
            self._state.running.discard(self)
            for generation in self._started:
                self._backend.cancel(generation)

    def fail(self, error: ApiError) -> None:
        """Stop whatever is still running and tell the sink."""
        if not self._over:
            self.cancel()
            self._sink.failed(error)

    def _receive(self, first_choice: int, delta: Delta) -> None:
        if self._over:
            return
        reason = delta.finish_reason
        if reason == "error" or reason == "abort":
            self.fail(self._generation_error(delta))
            return
        self._sink.delta(first_choice + delta.index, delta)
        if reason is not None and not self._over:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._over = True
                self._state.running.discard(self)
                self._sink.done(self._usage())

    def _usage(self) -> Usage:
        prompt = sum(generation.prompt_tokens for generation in self._started)
        completion = sum(generation.completion_tokens for generation in self._started)
        return Usage(prompt, completion, prompt + completion)

    def _generation_error(self, delta: Delta) -> ApiError:
        message = delta.error or "the engine ended this request"
        if self._backend.unhealthy() is not None:
            return unavailable(message, "engine_dead")
        return ApiError(500, message, code="generation_failed")


def as_api_error(error: Exception, prompt_field: str) -> ApiError:
    """The API's error for what ``Backend.start`` raises; anything else is raised as it is."""
    match error:
        case ApiError():
            return error
        case ParamError():
            return ApiError(400, error.message, param=error.param)
        case PromptTooLong():
            return ApiError(
                400,
                f"the prompt has {error.prompt_tokens} tokens, but this model's context length "
                f"is {error.limit} tokens and the completion needs at least one of them",
                param=prompt_field,
                code="context_length_exceeded",
            )
        case EmptyPrompt():
            return ApiError(400, "the prompt is empty", param=prompt_field, code="empty_prompt")
        case QueueFull():
            return ApiError(
                429,
                f"too many requests: {error}",
                type=RATE_LIMIT,
                code="queue_full",
                headers=((b"retry-after", b"1"),),
            )
        case EngineDead():
            return unavailable(str(error), "engine_dead")
        case _:
            raise error
