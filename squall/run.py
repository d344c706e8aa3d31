"""``squall run``: one answer to standard output, or a chat."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

import msgspec

from squall.progress import make_progress
from squall.runtime.options import EngineOptions
from squall.runtime.params import MAX_INT, SamplingParams

if TYPE_CHECKING:
    from squall.runtime.frontend import Frontend


class UsageError(Exception):
    """The command line asks for something that makes no sense; the message is one line."""


def run(args: argparse.Namespace, options: EngineOptions) -> int:
    """Carry ``squall run`` out; returns the exit code."""
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
    )
    params.validate(MAX_INT)  # none of these depends on the vocabulary: say so before loading
    prompt = read_prompt(args)
    from squall.llm import LLM

    given = msgspec.structs.asdict(options)
    with LLM(given.pop("model"), progress=make_progress(), **given) as llm:
        if prompt is None:
            _chat(llm.frontend, params)
        else:
            _answer(llm.frontend, prompt, params, args)
    return 0


def read_prompt(args: argparse.Namespace) -> str | None:
    """What to answer; None to chat."""
    prompt: str | None = args.prompt
    if prompt is None and sys.stdin is not None and not sys.stdin.isatty():
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 at byte {error.start}") from None
    if prompt is None:
        if args.raw or args.json:
            flag = "--raw" if args.raw else "--json"
            raise UsageError(f"{flag} needs a prompt: give one with -p or on standard input")
        return None
    if not prompt.strip():
        raise UsageError("the prompt is empty: give one with -p or on standard input")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8") from None
    return prompt


def _prompt_ids(frontend: "Frontend", prompt: str, raw: bool) -> list[int]:
    if raw:
        return frontend.encode_text(prompt)
    if frontend.template is None:
        raise UsageError(
            f"{frontend.card.name} has no chat template: give one with --chat-template, or "
            "continue plain text with --raw"
        )
    return frontend.encode_chat(frontend.render_chat([{"role": "user", "content": prompt}]))


def _answer(
    frontend: "Frontend", prompt: str, params: SamplingParams, args: argparse.Namespace
) -> None:
    from squall.answer import Answer, printable

    out = sys.stdout
    answer = Answer(frontend, _prompt_ids(frontend, prompt, args.raw), params)
    if args.json:
        for _ in answer:
            pass
        print(json.dumps(answer.report(frontend.card.name), ensure_ascii=False))
        return
    terminal = out.isatty()
    for piece in answer:
        out.write(printable(piece) if terminal else piece)
        out.flush()
    out.write("\n")
    out.flush()
    print(answer.summary(), file=sys.stderr)


def _chat(frontend: "Frontend", params: SamplingParams) -> None:
    import readline  # noqa: F401  (gives input() line editing and a history)

    from rich.console import Console

    from squall.chat import Chat

    if frontend.template is None:
        raise UsageError(
            f"{frontend.card.name} has no chat template: give one with --chat-template, or "
            "continue plain text with --raw and -p"
        )
    Chat(frontend, params, Console(), lambda: input("> ")).run()
