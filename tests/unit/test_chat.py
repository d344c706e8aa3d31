"""The interactive chat, single answers, and progress displays."""

import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from squall.answer import Answer, printable
from squall.chat import Chat
from squall.llm import GenerationError
from squall.progress import BarProgress, LineProgress, amount, make_progress
from squall.runtime.params import SamplingParams


def _fakes() -> ModuleType:
    path = Path(__file__).parents[1] / "fake_llm.py"
    spec = importlib.util.spec_from_file_location("squall_fake_llm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fakes = _fakes()
FakeFrontend, WORDS = fakes.FakeFrontend, fakes.WORDS


class Lines:
    """A ``read`` that returns one line after the other, then EOF."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    def __call__(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


def chat(frontend: FakeFrontend, *lines: str | type[BaseException]) -> tuple[str, Lines]:
    out, read = io.StringIO(), Lines(*lines)
    console = Console(file=out, width=200)
    Chat(frontend, SamplingParams(), console, read).run()  # type: ignore[arg-type]
    return out.getvalue(), read


def test_chat_remembers_forgets_and_obeys() -> None:
    frontend = FakeFrontend()
    answer = "".join(WORDS)
    text, _ = chat(
        frontend, "one", "", "\\system  be brief ", "two", "\\clear", "three", "\\system", "four"
    )
    assert frontend.prompts == [
        "<user>one",
        f"<system>be brief<user>one<assistant>{answer}<user>two",
        "<system>be brief<user>three",
        f"<user>three<assistant>{answer}<user>four",
    ]
    assert text.count(printable(answer)) == 4
    assert "\x1b" not in text


def test_chat_commands_and_ways_to_leave() -> None:
    text, rest = chat(FakeFrontend(), "\\help", "\\dance", "\\exit", "never read")
    assert "\\system MSG" in text
    assert "There is no command \\dance" in text
    assert rest.lines == ["never read"]
    _, rest = chat(FakeFrontend(), KeyboardInterrupt, "never read")
    assert rest.lines == ["never read"]


def test_chat_survives_what_one_question_breaks() -> None:
    frontend = FakeFrontend()
    text, _ = chat(frontend, "bad turn", "x" * 600, "broken", "fine")
    assert "roles must alternate" in text
    assert "the context length is 500 (at least one" in text
    assert "\\clear starts anew" in text
    assert "the step failed" in text
    assert frontend.prompts[-1] == "<user>fine"
    frontend.dead = "the engine stopped"
    with pytest.raises(GenerationError):
        chat(frontend, "broken")


def test_leaving_an_answer_cancels_it() -> None:
    frontend = FakeFrontend()
    answer = Answer(frontend, list(b"forever"), SamplingParams())  # type: ignore[arg-type]
    pieces = iter(answer)
    assert next(pieces) == "again "
    pieces.close()  # type: ignore[attr-defined]
    assert frontend.cancelled == 1
    assert answer.finish_reason is None
    assert answer.generation_rate is None


def test_printable_keeps_text_and_drops_controls() -> None:
    assert printable("a\tb\nc\x1b[2J\x07\x9b\x7f\r🦆é") == "a\tb\nc[2J🦆é"


def test_progress_lines_and_bars() -> None:
    stream = io.StringIO()
    assert isinstance(make_progress(stream), LineProgress)
    with make_progress(stream).phase("capture", 3, "it") as advance:
        advance(1)
        advance(2)
    assert re.fullmatch(r"capture: 3 in \d+\.\d s\n", stream.getvalue())
    stream.isatty = lambda: True  # type: ignore[method-assign]
    bars = make_progress(stream)
    assert isinstance(bars, BarProgress)
    for _ in range(2):
        with bars.phase("download", 100, "B") as first, bars.phase("load", None, "B") as second:
            first(100)
            second(5)


def test_amounts() -> None:
    values = (0, 999, 1000, 999_949, 999_950, 91_726_656, 4_200_000_000, 5e12)
    shown = ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "91.7 MB", "4.2 GB", "5.0 TB"]
    assert [amount(int(v), "B") for v in values] == shown
