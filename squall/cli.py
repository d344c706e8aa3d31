"""The ``squall`` command: ``run``, ``serve``, ``models`` and ``doctor``.

Nothing heavy is imported before the command line has been understood, so ``--help`` and mistakes
answer at once. Exit codes: 0 done, 1 failed, 2 the command line cannot be followed, 130 Ctrl-C.
"""

import argparse
import functools
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NoReturn

from squall import __version__
from squall.arguments import existing_file, integer, number, token_source
from squall.failures import FAILED, INTERRUPTED, UsageError, exit_code, one_line
from squall.runtime.options import EngineOptions

_DEFAULTS: Final = EngineOptions()
# For run and chat. Plain sampling (temperature 1, no filter) derails small models, greedy repeats.
_TEMPERATURE, _TOP_P, _MIN_P = 0.7, 0.95, 0.05
_DTYPES: Final = ("auto", "f32", "f16", "bf16")
_BLOCK_SIZES: Final = (8, 16, 32, 64)
_WIDTH: Final = 80


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without repeating the usage."""

    def __init__(self, **kwargs: Any) -> None:
        columns = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
        formatter = functools.partial(
            argparse.HelpFormatter, max_help_position=26, width=max(40, columns)
        )
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"squall: error: {line} ({self.prog} --help lists what is accepted)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="squall",
        description="Runs large language models, and serves them with the OpenAI API.",
    )
    parser.add_argument("--version", action="version", version=f"squall {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _add_run(commands)
    _add_serve(commands)
    models = commands.add_parser(
        "models",
        help="list the architectures that can be run",
        description="List the architectures that can be run, and what they are called in files.",
    )
    models.add_argument("--json", action="store_true", help="print one JSON list")
    models.add_argument("--debug", action="store_true", help="tracebacks with errors")
    models.set_defaults(function=_models)
    doctor = commands.add_parser(
        "doctor",
        help="check this machine: what is missing, and what mends it",
        description="Check Python, packages, devices, compiler, caches and the hub. "
        "Exit code 0: Squall can work here; 1: something it needs is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--debug", action="store_true", help="tracebacks with errors")
    doctor.set_defaults(function=_doctor)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="answer a prompt, or chat",
        description="Answer one prompt, or chat if there is none and this is a terminal. The "
        "answer goes to standard output as it is made, all else to standard error.",
    )
    prompt = run.add_argument_group("prompt")
    prompt.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="what to answer (default: standard input, unless it is a terminal; its last "
        "newline does not count)",
    )
    prompt.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is, without a chat template",
    )
    prompt.add_argument(
        "--json",
        action="store_true",
        help="print only one JSON object, once all is done",
    )
    _add_sampling(run)
    _add_engine(run)
    run.set_defaults(function=_run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-tokens",
        metavar="N",
        type=integer(1),
        help="generate at most N tokens (default: until the model ends or the context is full)",
    )
    add(
        "--temperature",
        metavar="T",
        type=number(0, 100),
        default=_TEMPERATURE,
        help="0: always the most likely token (default: %(default)s)",
    )
    add(
        "--top-p",
        metavar="P",
        type=number(0, 1, above=True),
        default=_TOP_P,
        help="only the likeliest tokens that add up to P; 1: off (default: %(default)s)",
    )
    add(
        "--top-k",
        metavar="K",
        type=integer(-1),
        default=0,
        help="only the K likeliest tokens; 0: off (default: %(default)s)",
    )
    add(
        "--min-p",
        metavar="P",
        type=number(0, 1),
        default=_MIN_P,
        help="only tokens at least P times as likely as the likeliest; 0: off "
        "(default: %(default)s)",
    )
    add(
        "--seed",
        metavar="N",
        type=integer(-(2**63), 2**64 - 1),
        help="the same seed gives the same text (default: another one each time)",
    )


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve the OpenAI API",
        description="Serve /v1/chat/completions, /v1/completions, /v1/models, /tokenize, "
        "/detokenize and /health. Ctrl-C or SIGTERM lets running requests finish, a second "
        "one does not.",
    )
    add = serve.add_argument_group("server").add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s)",
    )
    add(
        "--port",
        metavar="N",
        type=integer(0, 65535),
        default=1234,
        help="port to listen on; 0: any free one (default: %(default)s)",
    )
    add(
        "--shutdown-timeout",
        metavar="SECONDS",
        type=number(0, 86400),
        default=30.0,
        help="how long running requests may take to finish (default: %(default)g)",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="more names that clients may call the model by",
    )
    _add_engine(serve)
    serve.set_defaults(function=_serve)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """The options that become ``EngineOptions``; only given ones appear in the namespace."""
    model = functools.partial(
        parser.add_argument_group("model").add_argument, default=argparse.SUPPRESS
    )
    model(
        "-m",
        "--model",
        help="a GGUF file, a model folder or a hub id org/name[@revision] (default: a small "
        "demo model)",
    )
    model(
        "-f",
        "--filename",
        metavar="FILE.gguf",
        help="the GGUF file in that folder or repository; without -m, its path",
    )
    model(
        "--token-source",
        metavar="SOURCE",
        type=token_source,
        help="where the hub token is: literal:VALUE, env:VARIABLE, path:FILE, cache or none "
        f"(default: {_DEFAULTS.token_source})",
    )
    model(
        "--chat-template",
        metavar="FILE",
        type=existing_file,
        help="a .jinja or .json chat template (default: the model's own)",
    )
    engine = functools.partial(
        parser.add_argument_group("engine").add_argument, default=argparse.SUPPRESS
    )
    engine(
        "--device",
        help=f"auto, cpu, cuda[:N], xpu[:N] or mps (default: {_DEFAULTS.device})",
    )
    engine(
        "--dtype",
        choices=_DTYPES,
        help=f"of activations and KV cache (default: {_DEFAULTS.dtype}: what suits the device)",
    )
    engine(
        "--max-seq-len",
        metavar="N",
        type=integer(1),
        help="tokens of prompt and answer together (default: what model and memory allow)",
    )
    engine(
        "--max-seqs",
        metavar="N",
        type=integer(1),
        help=f"sequences computed at the same time (default: {_DEFAULTS.max_seqs})",
    )
    engine(
        "--attention-backend",
        choices=("auto", "triton", "xformers"),
        help="auto (default) takes the fastest kernel for each step",
    )
    engine(
        "--enforce-eager",
        action="store_true",
        help="launch kernels one by one instead of replaying CUDA graphs (slower; for debugging)",
    )
    _add_cache(parser)
    parser.add_argument(
        "--debug", action="store_true", help="detailed log, and tracebacks with errors"
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    cache = functools.partial(
        parser.add_argument_group(
            "KV cache",
            "Of several sizes, --pa-ctxt-len counts before --pa-gpu-mem-usage, and that before "
            "--pa-gpu-mem. Default: 0.9 of a GPU's memory, a few GiB on a CPU.",
        ).add_argument,
        default=argparse.SUPPRESS,
    )
    cache("--pa-ctxt-len", metavar="N", type=integer(1), help="room for N tokens in all")
    cache(
        "--pa-gpu-mem-usage",
        metavar="SHARE",
        type=number(0, 1, above=True),
        help="use this share of the device's memory, weights included (above 0, up to 1)",
    )
    cache("--pa-gpu-mem", metavar="MIB", type=integer(1), help="use this many MiB")
    cache(
        "--pa-blk-size",
        type=int,
        choices=_BLOCK_SIZES,
        help=f"tokens per block (default: {_DEFAULTS.pa_blk_size})",
    )


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The engine options of a command line. Raises UsageError."""
    given = {
        name: getattr(args, name) for name in EngineOptions.__struct_fields__ if hasattr(args, name)
    }
    name = given.get("filename")
    if name is not None and "model" not in given:
        if not name.lower().endswith(".gguf"):
            raise UsageError(
                f"-f {name}: without -m this is the path of a .gguf file; with -m it names the "
                "file in that folder or repository"
            )
        given["model"] = str(Path(given.pop("filename")).expanduser().absolute())
    return EngineOptions(**given)


def _run(args: argparse.Namespace) -> int:
    options = engine_options(args)
    from squall.run import RunOptions, run
    from squall.runtime.params import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
    )
    return run(RunOptions(options, params, args.prompt, raw=args.raw, json=args.json))


def _serve(args: argparse.Namespace) -> int:
    began = perf_counter()
    options = engine_options(args)
    from squall.progress import make_progress
    from squall.serve import loader
    from squall.server.app import ServeOptions, serve

    where = ServeOptions(
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name),
        shutdown_timeout=args.shutdown_timeout,
    )
    return serve(loader(options, make_progress()), where, started=began)


def _models(args: argparse.Namespace) -> int:
    from squall.model_list import models

    return models(as_json=args.json)


def _doctor(args: argparse.Namespace) -> int:
    from squall.doctor import doctor

    return doctor(as_json=args.json)


def _follow(argv: Sequence[str] | None) -> int:
    """Parse and run; every failure becomes an exit code and, at most, a line."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # --help and --version, or a usage error that has been told
        return end.code if isinstance(end.code, int) else 0
    logging.basicConfig(format="squall: %(levelname)s %(name)s: %(message)s")
    if args.debug:
        logging.getLogger("squall").setLevel(logging.DEBUG)
    try:
        code: int = args.function(args)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            sys.stderr.write(getattr(error, "traceback", ""))  # the engine process's own
            traceback.print_exc()
        print(f"squall: error: {one_line(error)}", file=sys.stderr)
        return exit_code(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Follow the command line ``argv`` (default: this process's); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # never fail on a character the terminal lacks
            stream.reconfigure(errors="replace")
    try:
        code = _follow(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read our output has enough; keep Python from flushing to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
