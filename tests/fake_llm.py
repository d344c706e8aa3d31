"""A model for tests of the command line; run as a script, it is ``squall`` with that model.

Not a test module: loaded by path.
"""

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

from squall import cli, serving
from squall.loaders.chat_template import TemplateError
from squall.loaders.errors import ModelLoadError
from squall.runtime.frontend import PromptTooLong
from squall.runtime.output import Delta
from squall.runtime.params import SamplingParams

WORDS = ["Hello", " wörld", "\x1b[31m", "!"]
LIMIT = 500


class FakeFrontend:
    """Answers WORDS; ``forever`` in the prompt never ends, ``broken`` fails in the middle."""

    card = SimpleNamespace(name="fake")
    template: object | None = object()

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.cancelled = 0
        self.dead: str | None = None
        self._stop = threading.Event()

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if messages[-1]["content"] == "bad turn":
            raise TemplateError("roles must alternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def encode_chat(self, text: str) -> list[int]:
        self.prompts.append(text)
        return list(text.encode())

    encode_text = encode_chat

    def start(self, prompt_ids: list[int], params: SamplingParams, on_delta: Any) -> Any:
        if len(prompt_ids) > LIMIT:
            raise PromptTooLong(len(prompt_ids), LIMIT)
        self.params.append(params)
        generation = SimpleNamespace(completion_tokens=0)
        prompt = bytes(prompt_ids).decode()
        self._stop.clear()

        def work() -> None:
            words = WORDS
            if "forever" in prompt:
                words = ["again "] * 100_000
            for i, word in enumerate(words):
                if self._stop.is_set():
                    return
                generation.completion_tokens += 1
                if "broken" in prompt and i == 2:
                    on_delta(Delta(0, "", (), (), "error", error="the step failed"))
                    return
                last = i == len(words) - 1
                on_delta(Delta(0, word, (i,), (), "stop" if last else None))
                time.sleep(0.001)

        threading.Thread(target=work, daemon=True).start()
        return generation

    def cancel(self, generation: Any) -> None:
        self._stop.set()
        self.cancelled += 1

    def unhealthy(self) -> str | None:
        return self.dead


class FakeLLM:
    """Stands in for squall.llm.LLM; the model ``none`` cannot be loaded."""

    made: "FakeLLM"

    def __init__(self, model: str | None = None, *, progress: Any = None, **options: Any) -> None:
        if model == "none":
            raise ModelLoadError("none: no such file")
        self.model, self.options = model, options
        self.frontend = FakeFrontend()
        if model == "bare":
            self.frontend.template = None
        with progress.phase("load", 2_500_000, "B") as advance:
            advance(2_500_000)
        FakeLLM.made = self

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def slow_open_process(options: Any, progress: Any) -> Any:
    """Stands in for open_process: ``none`` fails, anything else loads for a minute."""
    if options.model == "none":
        raise ModelLoadError("none: no such file")
    try:
        with progress.phase("load", None, "B") as advance:
            print("loading", file=sys.stderr, flush=True)
            for _ in range(3000):
                advance(1)
                time.sleep(0.02)
    except BaseException:
        print("interrupted", file=sys.stderr, flush=True)
        raise


if __name__ == "__main__":
    import squall.llm

    squall.llm.LLM = FakeLLM  # type: ignore[assignment, misc]
    serving.open_process = slow_open_process
    sys.exit(cli.main())
