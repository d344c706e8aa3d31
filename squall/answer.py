"""One answer from a loaded model: streamed piece by piece, timed, stopped by Ctrl-C."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from squall.loaders.progress import Progress
    from squall.runtime.frontend import Generation
    from squall.runtime.messages import ModelCard
    from squall.runtime.options import EngineOptions
    from squall.runtime.output import Delta
    from squall.runtime.params import SamplingParams

# What a model writes must not steer the terminal: control characters but tab and newline.
_CONTROL: Final = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})


class Model(Protocol):
    """What ``squall run`` needs of a loaded model (``squall.runtime.frontend.Frontend``)."""

    @property
    def card(self) -> "ModelCard": ...

    @property
    def template(self) -> object | None: ...

    def render_chat(self, messages: list[dict[str, Any]]) -> str: ...

    def encode_chat(self, text: str) -> list[int]: ...

    def encode_text(self, text: str) -> list[int]: ...

    def start(
        self,
        prompt_ids: list[int],
        params: "SamplingParams",
        on_delta: "Callable[[Delta], None]",
    ) -> "Generation":
        """Begin generating; ``on_delta`` is called on the engine's thread."""
        ...

    def cancel(self, generation: "Generation") -> None: ...

    def close(self) -> None: ...


OpenModel = Callable[["EngineOptions", "Progress"], Model]


@dataclass(frozen=True)
class Answer:
    """One generated text. Times in seconds since the prompt was handed in."""

    text: str
    finish_reason: str  # "stop", "length"; "abort": Ctrl-C
    prompt_tokens: int
    completion_tokens: int  # with the one that ended it
    first_token_s: float | None  # None: there was none
    total_s: float

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.finish_reason == "abort"

    @property
    def prompt_tok_s(self) -> float | None:
        """Prompt tokens by the time to the first new token."""
        return self.prompt_tokens / self.first_token_s if self.first_token_s else None

    @property
    def completion_tok_s(self) -> float | None:
        """New tokens after the first, by the time they took."""
        if self.first_token_s is None or self.completion_tokens < 2:
            return None
        elapsed = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / elapsed if elapsed > 0 else None


def generate(
    model: Model,
    prompt_ids: list[int],
    params: "SamplingParams",
    write: Callable[[str], None],
) -> Answer:
    """Generate one answer, passing each piece to ``write``; Ctrl-C ends it early.

    Raises ParamError, EmptyPrompt, PromptTooLong, QueueFull, EngineDead, GenerationError, and
    whatever ``write`` raises; nothing goes on in the engine then.
    """
    deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    pieces: list[str] = []
    reason: str | None = None
    first: float | None = None
    began = perf_counter()
    generation = model.start(prompt_ids, params, deltas.put)
    try:
        while reason is None:
            delta = deltas.get()
            if delta.finish_reason == "error":
                from squall.llm import GenerationError

                raise GenerationError(delta.error)
            first = first or perf_counter()
            if delta.text:
                pieces.append(delta.text)
                write(delta.text)
            reason = delta.finish_reason
    except KeyboardInterrupt:
        reason = "abort"
    finally:
        model.cancel(generation)
    return Answer(
        text="".join(pieces),
        finish_reason=reason,
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=generation.completion_tokens,
        first_token_s=None if first is None else first - began,
        total_s=perf_counter() - began,
    )


def statistics(answer: Answer) -> str:
    """Counts, speeds and times of an answer, in a line."""
    parts = [
        _speed("prompt", answer.prompt_tokens, answer.prompt_tok_s),
        _speed("answer", answer.completion_tokens, answer.completion_tok_s),
    ]
    if answer.first_token_s is not None:
        parts.append(f"first after {answer.first_token_s:.2f} s")
    parts.append(f"total {answer.total_s:.2f} s")
    if answer.finish_reason == "length":
        parts.append("cut: length limit")
    elif answer.stopped:
        parts.append("stopped")
    return " | ".join(parts)


def printable(text: str) -> str:
    """Model text without the characters that would steer a terminal."""
    return text.translate(_CONTROL)


def _speed(name: str, tokens: int, rate: float | None) -> str:
    return f"{name} {tokens} tokens" + (f", {rate:.1f} tok/s" if rate is not None else "")
