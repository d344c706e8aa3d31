"""The interactive chat of ``squall run``."""

from collections.abc import Callable

from rich.console import Console

from squall.answer import Answer, printable
from squall.llm import GenerationError
from squall.loaders.chat_template import TemplateError
from squall.runtime.frontend import Frontend, PromptTooLong
from squall.runtime.params import SamplingParams

HELP = """\\help         this list
\\system MSG   tell the model how to behave from now on (alone: forget it)
\\clear        forget the conversation, but not the system message
\\exit         leave; so do Ctrl-D and, at the prompt, Ctrl-C
Ctrl-C stops an answer."""


class Chat:
    """A conversation: reads lines, answers them, remembers both."""

    def __init__(
        self,
        frontend: Frontend,
        params: SamplingParams,
        console: Console,
        read: Callable[[], str],
    ) -> None:
        """``read`` returns the next line; it raises EOFError or KeyboardInterrupt to leave."""
        self._frontend = frontend
        self._params = params
        self._console = console
        self._read = read
        self._system: str | None = None
        self._turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Until the user leaves."""
        self._note(f"{self._frontend.card.name}: \\help lists the commands, \\exit leaves.")
        while True:
            try:
                line = self._read().strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line.startswith("\\"):
                if not self._command(line):
                    return
            elif line:
                self._answer(line)

    def _command(self, line: str) -> bool:
        """Obey a command; False to leave."""
        name, _, rest = line.partition(" ")
        match name:
            case "\\exit":
                return False
            case "\\help":
                self._note(HELP)
            case "\\clear":
                self._turns.clear()
                self._note("The conversation is forgotten.")
            case "\\system":
                self._system = rest.strip() or None
                self._note("The system message is " + ("set." if self._system else "removed."))
            case _:
                self._note(f"There is no command {name}; \\help lists them.")
        return True

    def _messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self._system}] if self._system else []
        return [*first, *self._turns]

    def _answer(self, line: str) -> None:
        """Generate and show one answer; what a question leads to that cannot be answered is
        forgotten."""
        self._turns.append({"role": "user", "content": line})
        answer: Answer | None = None
        try:
            text = self._frontend.render_chat(self._messages())
            answer = Answer(self._frontend, self._frontend.encode_chat(text), self._params)
            for piece in answer:
                self._console.out(printable(piece), end="", highlight=False)
            self._console.print()
            if answer.finish_reason == "length":
                self._note("(the answer was cut: the context or --max-tokens is used up)")
            self._note(answer.summary())
        except KeyboardInterrupt:
            self._console.print()
            self._note("(stopped)")
        except TemplateError as error:
            self._forget(f"The chat template refuses this conversation: {error}")
            return
        except PromptTooLong as error:
            self._forget(f"{error}; \\clear starts anew")
            return
        except GenerationError as error:
            if self._frontend.unhealthy() is not None:
                raise
            self._forget(str(error))
            return
        if answer is None or not answer.text:
            self._turns.pop()
        else:
            self._turns.append({"role": "assistant", "content": answer.text})

    def _forget(self, reason: str) -> None:
        self._turns.pop()
        self._note(reason)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)
