"""The interactive chat of ``squall run``."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from squall.answer import Model, generate, printable, statistics
from squall.kernels.cache import cache_dir
from squall.llm import GenerationError
from squall.loaders.chat_template import TemplateError
from squall.runtime.frontend import EmptyPrompt, PromptTooLong, QueueFull
from squall.runtime.params import ParamError, SamplingParams, is_unicode

HISTORY_LINES: Final = 1000
_HELP: Final = r"""\help        this list
\exit        leave; so do Ctrl-D and Ctrl-C at the prompt
\system MSG  set the system message; without MSG, remove it
\clear       forget the conversation, keep the system message
Ctrl-C stops an answer; what there is of it stays in the conversation."""


@dataclass
class Conversation:
    """The messages so far, the system message apart."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """All messages, in the form chat templates take."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def add(self, role: str, content: str) -> None:
        """Append one message."""
        self.turns.append({"role": role, "content": content})


def chat(model: Model, params: SamplingParams, *, history: Path | None = None) -> int:
    """Talk until the user leaves; returns the exit code.

    ``history`` is the file that keeps what was typed for the next chat (default: in the cache
    folder). Raises TemplateError for a model without a chat template, EngineDead when the engine
    is gone.
    """
    if model.template is None:
        raise TemplateError(
            "this model has none, so it cannot chat; give one with --chat-template, "
            "or have it continue a text with --raw -p TEXT"
        )
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    card = model.card
    console.print(printable(card.name), style="bold", end=": ")
    console.print(f"{card.format}, {card.device} ({card.dtype}), context {card.max_model_len}")
    console.print(r"\help lists the commands", style="dim")
    session = _Session(model, params, console)
    with _line_editing(history or cache_dir() / "chat_history"):
        while session.talking:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                break
            session.take(line)
    return 0


class _Session:
    """One chat; ``talking`` turns False when the user wants to leave."""

    def __init__(self, model: Model, params: SamplingParams, console: Console) -> None:
        self.talking = True
        self._model = model
        self._params = params
        self._console = console
        self._talk = Conversation()

    def take(self, line: str) -> None:
        """Follow a command, or answer a message."""
        if not is_unicode(line):
            self._say("what you typed is not valid UTF-8")
        elif line.startswith("\\"):
            self._command(line)
        elif line:
            self._answer(line)

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[], None]] = {
            "help": lambda: self._console.print(_HELP),
            "exit": self._leave,
            "system": lambda: self._set_system(argument),
            "clear": self._clear,
        }
        command = commands.get(name)
        if command is None:
            known = ", ".join("\\" + known for known in commands)
            self._say(f"unknown command \\{printable(name)}; the commands are {known}")
        elif argument and name != "system":
            self._say(f"\\{name} takes nothing after it")
        else:
            command()

    def _leave(self) -> None:
        self.talking = False

    def _clear(self) -> None:
        self._talk.turns.clear()
        self._console.print("conversation cleared", style="dim")

    def _set_system(self, text: str) -> None:
        self._talk.system = text or None
        said = "system message set" if text else "system message removed"
        self._console.print(said, style="dim")

    def _answer(self, line: str) -> None:
        """Show an answer; a message that got none leaves no trace in the conversation."""
        self._talk.add("user", line)
        try:
            ids = self._model.encode_chat(self._model.render_chat(self._talk.messages()))
            answer = generate(self._model, ids, self._params, _write)
        except PromptTooLong as error:
            self._forget(f"{error}; \\clear starts over")
            return
        except (
            ParamError,
            EmptyPrompt,
            QueueFull,
            TemplateError,
            GenerationError,
        ) as error:
            self._forget(str(error))
            return
        except KeyboardInterrupt:  # before the engine had it
            self._forget("stopped")
            return
        if answer.text:
            self._talk.add("assistant", answer.text)
        else:
            self._talk.turns.pop()
        if not answer.text.endswith("\n"):
            self._console.print()
        if answer.stopped:
            self._console.print("[stopped]", style="yellow")
        self._console.print(statistics(answer), style="dim")

    def _forget(self, reason: str) -> None:
        self._talk.turns.pop()
        self._say(reason)

    def _say(self, problem: str) -> None:
        self._console.print(" ".join(problem.split()), style="red")


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Line editing with a history that lasts, where Python has readline (not on Windows).

    A history that cannot be read or kept is no reason not to talk.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))  # what was typed is private
            readline.write_history_file(history)
