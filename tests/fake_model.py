"""A fake model for the tests of the command line. As a script: ``squall run`` with it.

Not a test module: loaded by path. It imports no torch as long as nothing fails, so that the tests
that need a process of its own are quick.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from squall import cli
from squall.run import RunOptions, run
from squall.runtime.options import EngineOptions
from squall.runtime.output import Delta
from squall.runtime.params import SamplingParams

WORDS = ("Hello", " wörld", "\x1b[31m", "!")
TEXT = "".join(WORDS)
LIMIT = 300


class FakeModel:
    """Answers WORDS. A prompt that ends in ``forever`` never ends, one in ``broken`` fails."""

    card: Any = SimpleNamespace(
        name="fake", format="F32", device="CPU", dtype="f32", max_model_len=LIMIT
    )

    def __init__(self, template: object | None = "a template") -> None:
        self.template = template
        self.prompts: list[str] = []
        self.cancelled = threading.Event()
        self.closed = False

    def open(self, options: EngineOptions, progress: Any) -> "FakeModel":
        with progress.phase("load", 3 << 20, "B") as advance:
            advance(3 << 20)
        return self

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        if "bad turn" in messages[-1]["content"]:
            from squall.loaders.chat_template import TemplateError

            raise TemplateError("roles must alternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def encode_chat(self, text: str) -> list[int]:
        return list(text.encode())

    encode_text = encode_chat

    def start(
        self, ids: list[int], params: SamplingParams, on_delta: Callable[[Delta], None]
    ) -> Any:
        if len(ids) >= LIMIT:
            from squall.runtime.frontend import PromptTooLong

            raise PromptTooLong(len(ids), LIMIT)
        self.prompts.append(bytes(ids).decode())
        self.cancelled.clear()
        generation = SimpleNamespace(prompt_tokens=len(ids), completion_tokens=0)
        work = threading.Thread(target=self._work, args=(generation, params, on_delta), daemon=True)
        work.start()
        return generation

    def _work(
        self, generation: Any, params: SamplingParams, on_delta: Callable[[Delta], None]
    ) -> None:
        prompt = self.prompts[-1]
        most = params.max_tokens or len(WORDS)
        for i, word in enumerate(WORDS * (10000 if prompt.endswith("forever") else 1)):
            generation.completion_tokens += 1
            if prompt.endswith("broken") and i == 2:
                on_delta(Delta(0, "", (), (), "error", error="the step failed"))
                return
            cut = None if prompt.endswith("forever") else "length" if i + 1 == most else None
            if i + 1 == len(WORDS) and not prompt.endswith("forever"):
                cut = "stop"
            on_delta(Delta(0, word, (i,), (), cut))
            if cut or self.cancelled.wait(0.002):
                return

    def cancel(self, generation: Any) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True


def main() -> int:
    """``fake_model.py [PROMPT] [json]``, under the command line's own handling of errors."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else None
    options = RunOptions(EngineOptions(), SamplingParams(), prompt, json="json" in sys.argv)
    model = FakeModel()
    cli._doctor = lambda args: run(options, model.open)
    code = cli.main(["doctor"])
    if "SQUALL_CACHE" in os.environ:
        folder = Path(os.environ["SQUALL_CACHE"])
        folder.joinpath("prompts").write_text("\n".join(model.prompts))
    return code


if __name__ == "__main__":
    # a test run in the background ignores SIGINT, and its children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
