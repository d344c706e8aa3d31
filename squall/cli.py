"""The ``squall`` command: ``run``, ``serve`` and ``doctor``.

Only argument parsing happens before the heavy imports, so that ``--help`` and mistakes in the
command line answer at once.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NoReturn

from squall import __version__
from squall.runtime.options import EngineOptions

DEFAULTS = EngineOptions()
RUN_TEMPERATURE = 0.7
RUN_TOP_P = 0.95

# Errors that are the command line's (exit code 2), and those a user can act on (1), by class
# name: the classes live in modules that are slow to import. All others are ours.
USAGE_ERRORS = frozenset({"UsageError", "OptionError", "DeviceError", "ParamError", "EmptyPrompt"})
KNOWN_ERRORS = frozenset(
    {
        "ModelLoadError",
        "KVMemoryError",
        "TemplateError",
        "PromptTooLong",
        "GenerationError",
        "EngineDead",
    }
)


class Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"squall: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="squall", description="LLM inference engine and OpenAI-compatible server.")
    parser.add_argument("--version", action="version", version=f"squall {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_serve(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check this machine: what is there, what is missing, what mends it",
        description="Check Python, torch, triton, GPU, driver, memory, caches and the hub.",
    )
    doctor.set_defaults(command=command_doctor, debug=False)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="answer a prompt, or chat",
        description="Answer one prompt (-p, or standard input if it is not a terminal); without "
        "one, chat. The answer goes to standard output, all else to standard error.",
    )
    prompt = run.add_argument_group("prompt")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="what to answer")
    prompt.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    prompt.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming"
    )
    sampling = run.add_argument_group("sampling")
    sampling.add_argument(
        "--max-tokens",
        metavar="N",
        type=_integer,
        help="tokens to generate at most (until the model stops or the context is full)",
    )
    sampling.add_argument(
        "--temperature",
        metavar="T",
        type=_number,
        default=RUN_TEMPERATURE,
        help="0: always the most likely token (%(default)s)",
    )
    sampling.add_argument(
        "--top-p",
        metavar="P",
        type=_number,
        default=RUN_TOP_P,
        help="only the most likely tokens that add up to P (%(default)s)",
    )
    sampling.add_argument(
        "--top-k", metavar="K", type=_integer, default=0, help="only the K most likely tokens (off)"
    )
    sampling.add_argument(
        "--min-p",
        metavar="P",
        type=_number,
        default=0.0,
        help="only tokens at least P times as probable as the likeliest (off)",
    )
    sampling.add_argument(
        "--seed", metavar="N", type=_integer, help="the same seed gives the same text (random)"
    )
    _add_engine_options(run)
    run.set_defaults(command=command_run)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve the OpenAI API",
        description="Serve /v1/chat/completions, /v1/completions and the rest of the OpenAI API.",
    )
    server = serve.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)"
    )
    server.add_argument(
        "--port",
        type=_port,
        default=1234,
        metavar="N",
        help="port to listen on; 0 takes a free one (%(default)s)",
    )
    server.add_argument(
        "--max-queue",
        type=_integer,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"requests that may wait; more get status 429 ({DEFAULTS.max_queue})",
    )
    _add_engine_options(serve)
    serve.set_defaults(command=command_serve)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What ``EngineOptions`` holds; what is not given stays out of the namespace."""

    def add(group: Any, *flags: str, **kwargs: Any) -> None:
        group.add_argument(*flags, default=argparse.SUPPRESS, **kwargs)

    model = parser.add_argument_group("model")
    add(
        model,
        "-m",
        "--model",
        help="a GGUF file, a model folder or a hub id org/name[@revision] (a small demo model)",
    )
    add(
        model,
        "-f",
        "--filename",
        metavar="FILE.gguf",
        help="which GGUF file of the folder or repository (the only one)",
    )
    add(
        model,
        "--token-source",
        metavar="SOURCE",
        help="where the hub token comes from: literal:VALUE, env:VARIABLE, path:FILE, cache or "
        f"none ({DEFAULTS.token_source})",
    )
    add(
        model,
        "--chat-template",
        metavar="FILE",
        help="a .jinja or .json chat template (the model's own)",
    )
    engine = parser.add_argument_group("engine")
    add(
        engine,
        "--device",
        help=f"auto, cpu, cuda[:N], xpu[:N] or mps ({DEFAULTS.device}: the best there is)",
    )
    add(
        engine,
        "--dtype",
        choices=("auto", "f32", "f16", "bf16"),
        help=f"of activations and KV cache ({DEFAULTS.dtype}: what suits the device)",
    )
    add(
        engine,
        "--max-seq-len",
        metavar="N",
        type=_integer,
        help="tokens of one sequence, prompt and answer (what the model and the memory allow)",
    )
    add(
        engine,
        "--max-seqs",
        metavar="N",
        type=_integer,
        help=f"sequences computed at the same time ({DEFAULTS.max_seqs})",
    )
    _add_cache_options(parser, add)
    parser.add_argument(
        "--debug", action="store_true", help="detailed log, and tracebacks with errors"
    )


def _add_cache_options(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    cache = parser.add_argument_group(
        "KV cache", "The first given of --pa-ctxt-len, --pa-gpu-mem-usage, --pa-gpu-mem counts."
    )
    add(
        cache,
        "--pa-ctxt-len",
        metavar="N",
        type=_integer,
        help="room for N tokens, of all sequences together",
    )
    add(
        cache,
        "--pa-gpu-mem-usage",
        metavar="SHARE",
        type=_number,
        help="this share of the device's memory, weights and all (0.9 on a GPU)",
    )
    add(cache, "--pa-gpu-mem", metavar="MIB", type=_integer, help="this many MiB")
    add(
        cache,
        "--pa-blk-size",
        metavar="N",
        type=_integer,
        help=f"tokens of one block: 8, 16, 32 or 64 ({DEFAULTS.pa_blk_size})",
    )


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer") from None


def _port(text: str) -> int:
    port = _integer(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 0 to 65535")
    return port


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The checked engine options of a command line. Raises OptionError."""
    from squall.runtime.memory import check_options

    given = {
        name: getattr(args, name) for name in EngineOptions.__struct_fields__ if hasattr(args, name)
    }
    options = EngineOptions(**given)
    check_options(options)
    return options


def command_run(args: argparse.Namespace) -> int:
    """``squall run``."""
    from squall.run import run

    return run(args, engine_options(args))


def command_serve(args: argparse.Namespace) -> int:
    """``squall serve``."""
    began = perf_counter()
    options = engine_options(args)
    from squall.progress import make_progress
    from squall.server.app import ServeOptions, serve
    from squall.serving import loader

    where = ServeOptions(host=args.host, port=args.port)
    return serve(loader(options, make_progress()), where, started=began)


def command_doctor(args: argparse.Namespace) -> int:
    """``squall doctor``."""
    from squall.doctor import doctor

    return doctor()


def exit_code(error: Exception) -> int:
    """2 if the command line is to blame, else 1."""
    return 2 if _kinds(error) & USAGE_ERRORS else 1


def _kinds(error: Exception) -> set[str]:
    """Class names of an error; an engine process reports that of its own error as ``kind``."""
    return {c.__name__ for c in type(error).__mro__} | {getattr(error, "kind", "")}


def _explain(error: Exception) -> str:
    """One line for people."""
    text = " ".join(str(error).split())
    if _kinds(error) & (USAGE_ERRORS | KNOWN_ERRORS):
        return text
    name = type(error).__name__
    return f"internal error: {name}: {text} (--debug shows where)" if text else f"internal {name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv``); returns the exit code."""
    args = build_parser().parse_args(argv)
    level = logging.DEBUG if args.debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            print(getattr(error, "traceback", ""), file=sys.stderr)
            traceback.print_exc()
        print(f"squall: {_explain(error)}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
