"""One answer to one prompt, piece by piece, with its timings."""

import queue
import re
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from squall.llm import GenerationError
from squall.runtime.frontend import Frontend
from squall.runtime.output import Delta
from squall.runtime.params import SamplingParams

# What a terminal would obey: C0 (but for tab and newline), DEL, C1.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """``text`` without control characters, for a terminal."""
    return _CONTROLS.sub("", text)


class Answer:
    """Generates when iterated over; leaving the iteration cancels what is unfinished."""

    def __init__(self, frontend: Frontend, prompt_ids: list[int], params: SamplingParams) -> None:
        """``params.n`` is 1."""
        self._frontend = frontend
        self._params = params
        self._prompt_ids = prompt_ids
        self.text = ""
        self.finish_reason: str | None = None
        self.completion_tokens = 0  # the stop token counts
        self.first_token_s: float | None = None  # seconds from the start
        self.total_s = 0.0

    def __iter__(self) -> Iterator[str]:
        """The text as it comes. Raises what ``Frontend.start`` does and GenerationError."""
        deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        begin = perf_counter()
        generation = self._frontend.start(self._prompt_ids, self._params, deltas.put)
        try:
            while self.finish_reason is None:
                delta = deltas.get()
                self.total_s = perf_counter() - begin
                if delta.finish_reason == "error":
                    raise GenerationError(delta.error)
                if self.first_token_s is None:
                    self.first_token_s = self.total_s
                self.completion_tokens = generation.completion_tokens
                self.finish_reason = delta.finish_reason
                self.text += delta.text
                yield delta.text
        finally:
            self._frontend.cancel(generation)

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt_ids)

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens per second, up to the first token of the answer."""
        return self.prompt_tokens / self.first_token_s if self.first_token_s else None

    @property
    def generation_rate(self) -> float | None:
        """Tokens per second after the first one; None when there is only one."""
        if self.first_token_s is None or self.total_s <= self.first_token_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.first_token_s)

    def summary(self) -> str:
        """The statistics in one line."""
        first = "-" if self.first_token_s is None else f"{self.first_token_s:.2f} s"
        return (
            f"prompt {self.prompt_tokens} tokens, {_rate(self.prompt_rate)} | "
            f"generated {self.completion_tokens} tokens, {_rate(self.generation_rate)} | "
            f"first token after {first}"
        )

    def report(self, model: str) -> dict[str, Any]:
        """Everything for ``--json``."""
        return {
            "model": model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
            "timings": {
                "time_to_first_token_s": self.first_token_s,
                "total_s": self.total_s,
                "prompt_tokens_per_s": self.prompt_rate,
                "generated_tokens_per_s": self.generation_rate,
            },
        }


def _rate(value: float | None) -> str:
    return "- tok/s" if value is None else f"{value:.1f} tok/s"
