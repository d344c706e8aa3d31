"""Speed of the engine: ``python bench/run.py [-m MODEL | --case NAME --quant RECIPE] ...``.

``-m`` measures a model's files, ``--case`` random weights of a public architecture
(``bench/cases.py``) in the types of a llama.cpp quantisation recipe (``bench/random_weights.py``).
The method (``bench/measure.py``) is that of the other engines' figures in ``bench/peers.json``.
The floor is what the machine's measured memory bandwidth and matrix rate allow.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from squall.bench import peers
from squall.bench.cases import CASES
from squall.bench.kernel_table import kernel_tables
from squall.bench.machine import MemoryMeter, describe, measure_ceilings
from squall.bench.measure import Bench, BenchError, Load, Row
from squall.bench.random_weights import RECIPES
from squall.bench.startup import measure_startup
from squall.bench.subject import DENSE, Spec, Subject, open_subject
from squall.kernels.backends.device import DeviceError, backend_of, resolve_device
from squall.loaders.errors import ModelLoadError
from squall.progress import make_progress
from squall.runtime.memory import KVMemoryError, OptionError
from squall.runtime.options import EngineOptions
from squall.runtime.startup import DTYPES

OFFLINE_SEQS = 256  # sequences run at the same time, unless --max-seqs says otherwise
DEFAULTS = EngineOptions()


def _numbers(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        message = f"{text!r} is neither a list like 1,8,32 nor none"
        raise argparse.ArgumentTypeError(message) from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be at least 1")
    return values


def _positive(text: str) -> int:
    values = _numbers(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return values[0]


def _load(text: str) -> Load:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if match is None:
        message = f"{text!r} is not REQUESTSxPROMPT+OUTPUT, such as 512x512+128"
        raise argparse.ArgumentTypeError(message)
    return Load(*map(int, match.groups()))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends the process with code 2 when it cannot be used."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("-m", "--model", help="model file, folder or hub id (default: the demo model)")
    add("-f", "--filename", help="GGUF file inside that folder or repository")
    add("--case", choices=CASES, metavar="NAME", help=f"random weights: {', '.join(CASES)}")
    add("--quant", choices=(DENSE, *RECIPES), default=DENSE, help="types of a case's weights")
    add("--device", default=DEFAULTS.device)
    add("--dtype", default=DEFAULTS.dtype)
    add("--batch", type=_numbers, default=[1, 8], help="decode batch sizes, or none")
    add("--prefill", type=_numbers, default=[512], help="prefill prompt lengths, or none")
    add("--prompt-len", type=_positive, default=128, help="decode prompt length")
    add("--output-len", type=_positive, default=128, help="decode new tokens")
    add("--offline", type=_load, metavar="NxP+O", help="throughput of N requests of P+O tokens")
    add("--long", type=_positive, metavar="TOKENS", help="decode one sequence of this length too")
    add("--startup", action="store_true", help="time fresh processes up to their first token")
    add("--profile", type=Path, metavar="FILE", help="write the time of each kernel to this file")
    add("--repeats", type=_positive, default=3)
    add("--max-seqs", type=_positive, help="sequences run at the same time")
    add("--token-budget", type=_positive, help="tokens of a step (default: the engine's)")
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add("--peer-case", choices=peers.known_cases(), metavar="ROW", help="row of bench/peers.json")
    add("--json", type=Path, help="write the result to this file too")
    args = parser.parse_args(argv)
    if args.case and (args.model or args.filename):
        parser.error("--case makes its own weights: leave out -m and -f")
    if args.quant != DENSE and not args.case:
        parser.error("--quant needs a --case")
    return args


def make_options(args: argparse.Namespace) -> EngineOptions:
    """Engine options for what ``args`` ask to measure: the defaults, with as many sequences as are
    measured. On a CPU the KV cache is only as large as needed, for it takes room from the weights'
    cached file."""
    new = args.output_len + 1
    loads = [Load(1, prompt, 1) for prompt in args.prefill]
    loads += [Load(batch, args.prompt_len, new) for batch in args.batch]
    if args.long:
        loads += [Load(1, args.long, new), Load(1, args.prompt_len, new)]
    if args.offline:
        loads.append(args.offline)
    running = args.max_seqs or max([min(load.requests, OFFLINE_SEQS) for load in loads] or [1])
    context = None
    if resolve_device(args.device).type == "cpu":
        block = DEFAULTS.pa_blk_size
        blocks = [
            min(load.requests, running) * (-(-(load.prompt + load.output) // block) + 1)
            for load in loads
        ]
        context = max([*blocks, 16]) * block
    return EngineOptions(
        model=args.model,
        filename=args.filename,
        device=args.device,
        dtype=args.dtype,
        max_seqs=running,
        max_queue=max([DEFAULTS.max_queue, *(load.requests for load in loads)]),
        token_budget=args.token_budget,
        pa_ctxt_len=context,
        enforce_eager=args.enforce_eager,
    )


def measure(bench: Bench, args: argparse.Namespace, rows: list[Row]) -> dict[str, float]:
    """Add all asked-for rows to ``rows``; with ``--long``, returns the ratio of the long context's
    decode speed to the short one's."""
    for prompt in args.prefill:
        rows.append(bench.prefill(prompt))
    for batch in args.batch:
        rows.append(bench.decode(batch, args.prompt_len, args.output_len))
    extra: dict[str, float] = {}
    if args.long:
        short = next((row for row in rows if (row.what, row.batch) == ("decode", 1)), None)
        if short is None:
            short = bench.decode(1, args.prompt_len, args.output_len)
            rows.append(short)
        rows.append(bench.decode(1, args.long, args.output_len))
        extra["long_ratio"] = rows[-1].tok_s / short.tok_s
    if args.offline:
        rows.append(bench.offline(args.offline))
    return extra


def show(subject: Subject, rows: list[Row], console: Console) -> None:
    """A table: ours, the best peer, the ratio, the floor, our share of it."""
    device = subject.engine.model.device
    table = Table(title=f"{subject.name} ({subject.format}, {device}), tokens per second")
    for column in ("", "batch", "prompt", "squall", "best peer", "ratio", "floor", "of floor"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        name, best = max(row.peers.items(), key=lambda item: item[1], default=("", 0.0))
        table.add_row(
            row.what,
            str(row.batch),
            str(row.prompt),
            f"{row.tok_s:,.1f}",
            f"{name} {best:,.0f}" if best else "-",
            f"{row.tok_s / best:.2f}" if best else "-",
            f"{row.floor_tok_s:,.0f}",
            f"{row.tok_s / row.floor_tok_s:.0%}",
        )
    console.print(table)


def show_startup(
    rows: list[dict[str, float | str]], others: dict[str, float], console: Console
) -> None:
    """Seconds from process start to first token, by phase."""
    beside = ", ".join(f"{name} {seconds:.0f}" for name, seconds in others.items())
    title = "seconds from process start to first token" + (f" ({beside})" if beside else "")
    table = Table(title=title)
    for column in rows[0]:
        table.add_column("" if column == "state" else column, justify="right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.2f}" for v in row.values()))
    console.print(table)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, show, and return what ``--json`` writes."""
    device = resolve_device(args.device)
    spec = Spec(case=args.case, quant=args.quant, options=make_options(args))
    result: dict[str, Any] = describe(device)
    if args.startup:  # before this process takes the device's memory
        start = Spec(case=args.case, quant=args.quant, options=_startup_options(args))
        result["startup"] = measure_startup(start)
    dtype = DTYPES.get(args.dtype, backend_of(device).default_dtype(device))
    ceilings = measure_ceilings(device, dtype)
    meter = MemoryMeter(device)
    subject = open_subject(spec, make_progress())
    peer_case = args.peer_case or f"{subject.name}-{subject.format}"
    engine = subject.engine
    rows: list[Row] = []
    try:
        extra = measure(Bench(engine, ceilings, peer_case, args.repeats), args, rows)
    finally:  # a row that fails does not take the others with it
        if rows:
            show(subject, rows, console)
    memory = meter.read(engine.model.nbytes, engine.cache.nbytes)
    if args.profile:
        prompt = max(args.prefill, default=512)
        batch = min(args.batch, default=1)
        args.profile.write_text(kernel_tables(engine, batch, args.prompt_len, prompt))
    result |= {
        "case": args.case,
        "quant": args.quant,
        "model": subject.name,
        "format": subject.format,
        "dtype": subject.dtype,
        "graphs": subject.graphs,
        "max_seqs": spec.options.max_seqs,
        "token_budget": engine.limits.token_budget,
        "load_s": {name: round(value, 2) for name, value in subject.seconds.items()},
        "memory_bytes": memory,
        "ceilings": asdict(ceilings),
        **extra,
        "rows": [asdict(row) for row in rows],
    }
    if args.long:
        console.print(f"decode at {args.long} tokens is {extra['long_ratio']:.2f} of the short one")
    if args.startup:
        show_startup(result["startup"], peers.figure(peer_case, "startup_s"), console)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in subject.seconds.items())
    sizes = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in memory.items())
    console.print(
        f"{seconds}; {sizes}; graphs {'on' if subject.graphs else 'off'}; "
        f"read {ceilings.read_bytes_s / 1e9:,.0f} GB/s, copy {ceilings.copy_bytes_s / 1e9:,.0f} "
        f"GB/s, matmul {ceilings.matmul_flops_s / 1e12:.2f} TFLOP/s",
        highlight=False,
    )
    return result


def _startup_options(args: argparse.Namespace) -> EngineOptions:
    """What a user gets who asks for nothing but the model."""
    return EngineOptions(
        model=args.model,
        filename=args.filename,
        device=args.device,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        result = run(args, Console())
    except (BenchError, DeviceError, KVMemoryError, ModelLoadError, OptionError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
