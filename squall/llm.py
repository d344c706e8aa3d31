"""``LLM``: the Python API, with the engine in a thread of this process."""

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from squall.loaders.progress import NoProgress, Progress
from squall.runtime.frontend import Frontend, Generation, QueueFull
from squall.runtime.messages import ModelCard
from squall.runtime.options import EngineOptions
from squall.runtime.output import Delta, Logprob
from squall.runtime.params import SamplingParams
from squall.runtime.startup import open_thread

Chat = list[dict[str, Any]]
_QUEUE_RETRY_S = 0.01


@dataclass
class Completion:
    """One generated sequence."""

    index: int  # which of the request's n
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or id that ended it


@dataclass
class Output:
    """What one prompt gave; ``text`` and ``finish_reason`` are the first completion's."""

    prompt_ids: list[int]
    completions: list[Completion]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.completions[0].finish_reason


@dataclass(frozen=True)
class StreamItem:
    """A piece of a streamed answer: ``prompt`` counts the prompts given."""

    prompt: int
    delta: Delta


class GenerationError(RuntimeError):
    """The engine could not finish a request."""


class LLM:
    """A loaded model.

    ``model`` is a local file or folder or a hub id; without one the demo model is fetched. The
    keyword options are the fields of :class:`squall.runtime.options.EngineOptions`. Raises
    ModelLoadError, DeviceError or KVMemoryError when it cannot be had.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineOptions.__struct_fields__))
        if unknown:
            known = ", ".join(EngineOptions.__struct_fields__)
            raise TypeError(f"LLM() has no option {unknown[0]!r}; the options are {known}")
        chosen = EngineOptions(model=model, **options)
        self._frontend = open_thread(chosen, progress or NoProgress())

    @property
    def card(self) -> ModelCard:
        """Name, format, device, context length and memory of the model."""
        return self._frontend.card

    @property
    def frontend(self) -> Frontend:
        """The text side: tokenizer, chat template, starting and cancelling generations."""
        return self._frontend

    @overload
    def generate(
        self,
        prompts: str | Chat | list[str] | list[Chat],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
    ) -> list[Output]: ...

    @overload
    def generate(
        self,
        prompts: str | Chat | list[str] | list[Chat],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[StreamItem]: ...

    def generate(
        self,
        prompts: str | Chat | list[str] | list[Chat],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
    ) -> list[Output] | Iterator[StreamItem]:
        """Complete texts, or answer chats (lists of ``{"role", "content"}``).

        One prompt or a list of them; a list is computed together. With ``stream`` the pieces come
        as they are made; leaving the iterator cancels what is unfinished. Raises ParamError,
        PromptTooLong, EmptyPrompt, TemplateError, GenerationError.
        """
        ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        params = params or SamplingParams()
        return self._stream(ids, params) if stream else self._complete(ids, params)

    def close(self) -> None:
        """Stop the engine; unfinished generations end with an error."""
        self._frontend.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _encode(self, prompt: str | Chat) -> list[int]:
        if isinstance(prompt, str):
            return self._frontend.encode_text(prompt)
        return self._frontend.encode_chat(self._frontend.render_chat(prompt))

    def _stream(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[StreamItem]:
        items: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
        started: list[Generation] = []
        left = len(prompts) * params.n
        try:
            while left:
                self._start_some(prompts, params, started, items)
                if left == (len(prompts) - len(started)) * params.n:  # others fill the queue
                    time.sleep(_QUEUE_RETRY_S)
                    continue
                item = items.get()
                if item.delta.finish_reason == "error":
                    raise GenerationError(item.delta.error)
                left -= item.delta.finish_reason is not None
                yield item
        finally:
            for generation in started:
                self._frontend.cancel(generation)

    def _start_some(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        started: list[Generation],
        items: "queue.SimpleQueue[StreamItem]",
    ) -> None:
        """Start the prompts that follow the started ones, as many as the queue takes."""
        for i in range(len(started), len(prompts)):
            try:
                started.append(self._frontend.start(prompts[i], params, _Tagged(i, items)))
            except QueueFull:
                return

    def _complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Output]:
        outputs = [Output(ids, [Completion(i) for i in range(params.n)]) for ids in prompts]
        for item in self._stream(prompts, params):
            _extend(outputs[item.prompt].completions[item.delta.index], item.delta)
        return outputs


@dataclass(frozen=True)
class _Tagged:
    """An ``on_delta`` that remembers which prompt it is for."""

    prompt: int
    items: "queue.SimpleQueue[StreamItem]"

    def __call__(self, delta: Delta) -> None:
        self.items.put(StreamItem(self.prompt, delta))


def _extend(completion: Completion, delta: Delta) -> None:
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.logprobs += delta.logprobs
    completion.finish_reason = delta.finish_reason
    completion.stop_reason = delta.stop_reason


def _as_list(prompts: str | Chat | list[str] | list[Chat]) -> list[str | Chat]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], dict):
        return [prompts]
    return list(prompts)  # type: ignore[arg-type]
