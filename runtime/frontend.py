"""The text side of the engine: prompts to ids, token events to text.

The Python API and the HTTP server both stand on this. Everything here runs on one thread at a
time per call; ``on_delta`` is called on the thread that delivers the engine's events.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from squall.loaders.chat_template import TemplateError
from squall.loaders.load import TextAssets
from squall.runtime.client import EngineClient
from squall.runtime.messages import ModelCard
from squall.runtime.output import Delta, OutputStream, StopStrings
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, TokenEvent


class QueueFull(Exception):
    """More requests are unfinished than the engine may hold."""


class EngineDead(Exception):
    """The engine is gone; nothing can be generated any more."""


class EmptyPrompt(ValueError):
    """A prompt of no tokens."""


class PromptTooLong(ValueError):
    """The prompt leaves no room for one new token; both numbers are tokens."""

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context length is {limit} "
            f"(at least one is needed for the answer)"
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


@dataclass
class Generation:
    """One request: ``n`` sequences from one prompt."""

    id: int  # of its first sequence; the others follow
    prompt_tokens: int
    n: int
    on_delta: Callable[[Delta], None]
    streams: list[OutputStream]
    completion_tokens: int = 0  # every sampled token, the one that stopped included
    unfinished: set[int] = field(default_factory=set)  # engine ids

    @property
    def finished(self) -> bool:
        return not self.unfinished


class Frontend:
    """Starts generations on an engine and turns its events into text."""

    def __init__(self, card: ModelCard, assets: TextAssets, engine: EngineClient) -> None:
        self.card = card
        self.tokenizer = assets.tokenizer
        self.template = assets.template
        self._eos_ids = sorted(assets.eos_ids)
        self._engine = engine
        self._lock = threading.Lock()  # guards what follows
        self._next_id = 0
        self._active: dict[int, Generation] = {}
        self._dead: str | None = None
        engine.listen(self._on_events, self._on_death)

    @property
    def running(self) -> int:
        """Sequences that are not finished."""
        return len(self._active)

    def unhealthy(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        return self._dead

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat as one string, by the model's template. Raises TemplateError."""
        if isinstance(self.template, TemplateError):
            raise self.template
        if self.template is None:
            raise TemplateError("this model has no chat template; give one with --chat-template")
        return self.template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat, with exactly one BOS if the model uses one."""
        ids = self.tokenizer.encode(text, add_special=True)
        bos = self.tokenizer.bos_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the special tokens the model file asks for; an empty text
        gives no ids."""
        return self.encode_chat(text) if text else []

    def start(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        on_delta: Callable[[Delta], None],
    ) -> Generation:
        """Begin generating; ``on_delta`` gets each sequence's news, step by step.

        Raises ParamError, EmptyPrompt, PromptTooLong, QueueFull, EngineDead.
        """
        params.validate(self.card.vocab_size)
        if not prompt_ids:
            raise EmptyPrompt("the prompt is empty")
        limit = self.card.max_model_len
        if len(prompt_ids) >= limit:
            raise PromptTooLong(len(prompt_ids), limit)
        stops = StopStrings(params.stop)
        streams = [OutputStream(i, self.tokenizer, params, stops) for i in range(params.n)]
        breakers = self._breaker_ids(params)
        with self._lock:
            if self._dead is not None:
                raise EngineDead(self._dead)
            room = self.card.max_seqs + self.card.max_queue
            if len(self._active) + params.n > room:
                raise QueueFull(
                    f"{len(self._active)} sequences are unfinished, the limit is {room}"
                )
            first = self._next_id
            self._next_id += params.n
            generation = Generation(first, len(prompt_ids), params.n, on_delta, streams)
            ids = range(first, first + params.n)
            generation.unfinished.update(ids)
            self._active.update(dict.fromkeys(ids, generation))
        for i, request_id in enumerate(ids):
            request = EngineRequest(
                request_id, prompt_ids, params.choice(i), self._eos_ids, breakers
            )
            self._engine.submit(request)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a generation; its ``on_delta`` is not called any more. Idempotent."""
        with self._lock:
            ids = list(generation.unfinished)
            generation.unfinished.clear()
            for request_id in ids:
                self._active.pop(request_id, None)
        for request_id in ids:
            self._engine.abort(request_id)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _breaker_ids(self, params: SamplingParams) -> list[list[int]]:
        if not params.dry_multiplier:
            return []
        encode = self.tokenizer.encode
        return [
            encode(text, add_special=False, parse_special=False)
            for text in params.dry_sequence_breakers
        ]

    def _on_events(self, events: list[TokenEvent]) -> None:
        for event in events:
            generation = self._active.get(event.id)
            if generation is not None:
                self._deliver(generation, event)

    def _deliver(self, generation: Generation, event: TokenEvent) -> None:
        stream = generation.streams[event.id - generation.id]
        generation.completion_tokens += len(event.token_ids) + (event.stop_token is not None)
        delta = stream.feed(event)
        if delta.finish_reason is not None:
            with self._lock:
                self._active.pop(event.id, None)
                generation.unfinished.discard(event.id)
            if event.finish_reason is None:  # a stop string: the engine does not know
                self._engine.abort(event.id)
        generation.on_delta(delta)

    def _on_death(self, reason: str) -> None:
        with self._lock:
            self._dead = reason
            ids = list(self._active)
        self._on_events([TokenEvent(i, [], finish_reason="error", error=reason) for i in ids])
