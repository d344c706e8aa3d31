"""``squall run``: answer one prompt, or chat."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from squall.answer import Answer, Model, OpenModel, generate, printable, statistics
from squall.failures import INTERRUPTED, UsageError
from squall.loaders.progress import Progress
from squall.progress import make_progress
from squall.runtime.options import EngineOptions
from squall.runtime.params import SamplingParams

_GIVE_ONE = "give it with -p TEXT, or pipe it in"


@dataclass(frozen=True)
class RunOptions:
    """What ``squall run`` was asked to do. No ``prompt``: standard input, or a chat."""

    engine: EngineOptions
    params: SamplingParams
    prompt: str | None = None
    raw: bool = False  # continue the text instead of answering it as a chat message
    json: bool = False


def open_model(options: EngineOptions, progress: Progress) -> Model:
    """Load the model into this process."""
    from squall.kernels.backends.device import resolve_device
    from squall.runtime.startup import open_thread

    resolve_device(options.device)  # a wrong name is told before anything is downloaded
    return open_thread(options, progress)


def run(options: RunOptions, open_model: OpenModel = open_model) -> int:
    """Answer the prompt, or chat at a terminal; returns the exit code (130: Ctrl-C).

    The answer goes to standard output, everything else to standard error. Raises UsageError and
    what loading and generating raise.
    """
    if options.prompt is None and sys.stdin.isatty():
        _check_chat(options)
        return _chat(options, open_model)
    prompt = _read_stdin() if options.prompt is None else options.prompt
    _check_prompt(prompt)
    began = perf_counter()
    model = open_model(options.engine, make_progress())
    try:
        load_s = perf_counter() - began
        ids = _encode(model, prompt, options.raw)
        answer = generate(model, ids, options.params, _writer(options.json))
        if options.json:
            print(json.dumps(_report(model.card.name, answer, load_s), ensure_ascii=False))
        else:
            _finish(answer)
    finally:
        model.close()
    return INTERRUPTED if answer.stopped else 0


def _check_chat(options: RunOptions) -> None:
    for flag, given in (("--json", options.json), ("--raw", options.raw)):
        if given:
            raise UsageError(f"{flag} needs a prompt: {_GIVE_ONE}")
    if not sys.stdout.isatty():
        raise UsageError(f"no prompt, and a chat needs a terminal to write to: {_GIVE_ONE}")


def _chat(options: RunOptions, open_model: OpenModel) -> int:
    from squall.chat import chat

    model = open_model(options.engine, make_progress())
    try:
        return chat(model, options.params)
    finally:
        model.close()


def _read_stdin() -> str:
    """Standard input as text, without the newline that ends it."""
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not valid UTF-8 (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def _check_prompt(prompt: str) -> None:
    if not prompt:
        raise UsageError(f"the prompt is empty: {_GIVE_ONE}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # how Python passes on bytes that are no UTF-8
        raise UsageError(f"the prompt is not valid UTF-8 (character {error.start})") from None


def _encode(model: Model, prompt: str, raw: bool) -> list[int]:
    if not raw and model.template is None:
        print(
            "squall: the model has no chat template, so the text is continued as it is (--raw)",
            file=sys.stderr,
        )
        raw = True
    if raw:
        return model.encode_text(prompt)
    return model.encode_chat(model.render_chat([{"role": "user", "content": prompt}]))


def _writer(silent: bool) -> Callable[[str], None]:
    """Prints each piece at once, or, with ``silent``, nothing."""
    if silent:
        return lambda text: None
    shown = printable if sys.stdout.isatty() else str

    def write(text: str) -> None:
        sys.stdout.write(shown(text))
        sys.stdout.flush()

    return write


def _finish(answer: Answer) -> None:
    if not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    print(f"squall: {statistics(answer)}", file=sys.stderr)


def _report(model: str, answer: Answer, load_s: float) -> dict[str, Any]:
    """The object ``--json`` prints. Times in seconds; ``total_s`` is without loading."""
    return {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
        "timings": {
            "load_s": _rounded(load_s),
            "time_to_first_token_s": _rounded(answer.first_token_s),
            "prompt_tok_s": _rounded(answer.prompt_tok_s),
            "completion_tok_s": _rounded(answer.completion_tok_s),
            "total_s": _rounded(answer.total_s),
        },
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
