"""Time of each kernel on its own problems: ``python bench/kernels.py [--kernel PATTERN]``.

The problems are those ``tools/tune.py`` tunes (``TUNABLE`` in the kernel files), with the launch
parameters in the table of this GPU; where it has none, with the first candidate, which is marked.
TB/s count the bytes a problem must move once, and are compared with a large copy.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from squall.bench.cases import CASES as ALL_CASES
from squall.bench.machine import copy_bytes_s, describe
from squall.bench.problems import (
    CASES,
    DeviceLostError,
    Found,
    GraphTimer,
    config_text,
    find_problems,
)
from squall.kernels.backends.device import DeviceError, resolve_device
from squall.kernels.tuning import Config, Problem, tuned

Timer = Callable[[Problem, Sequence[Config]], list[float | str]]


@dataclass(frozen=True)
class Timing:
    name: str  # "kernel/key"
    config: dict[str, int]
    tuned: bool  # from the GPU's table
    seconds: float | None  # None: it cannot run
    problem: str | None  # why not
    bytes_s: float | None


def measure(found: Sequence[Found], timer: Timer, device: torch.device) -> list[Timing]:
    """Every problem once, with its table's launch parameters or the first candidate."""
    timings = []
    for entry in found:
        config = tuned(entry.kernel, entry.problem.key, device)
        chosen = entry.problem.candidates[0] if config is None else config
        (result,) = timer(entry.problem, [chosen])
        seconds = None if isinstance(result, str) else result
        timings.append(
            Timing(
                entry.name,
                dict(chosen),
                config is not None,
                seconds,
                result if isinstance(result, str) else None,
                None if seconds is None else entry.problem.nbytes / seconds,
            )
        )
    return timings


def table(timings: Sequence[Timing], copy: float) -> str:
    """A line for each problem; ``copy`` is the bandwidth of a copy, bytes/s."""
    width = max(len(timing.name) for timing in timings)
    lines = [f"{'problem':<{width}} {'us':>9} {'TB/s':>6} {'copy':>5}  launch parameters"]
    for row in timings:
        parameters = config_text(row.config) + ("" if row.tuned else "  (first candidate)")
        if row.seconds is None or row.bytes_s is None:
            lines.append(f"{row.name:<{width}} cannot run with {parameters}: {row.problem}")
            continue
        lines.append(
            f"{row.name:<{width}} {row.seconds * 1e6:>9.2f} {row.bytes_s / 1e12:>6.2f} "
            f"{row.bytes_s / copy:>5.0%}  {parameters}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=ALL_CASES, default=CASES, metavar="NAME")
    parser.add_argument("--kernel", default="*", help="shell pattern of a kernel or kernel/key")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        if device.type != "cuda":
            raise DeviceError(f"kernels are timed in CUDA graphs, which {device} does not have")
        found = find_problems(tuple(args.case), args.kernel)
        copy = copy_bytes_s(device)
        timings = measure(found, GraphTimer(device), device)
    except (DeviceError, DeviceLostError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table(timings, copy))
    if args.json:
        rows = [asdict(timing) for timing in timings]
        result = {**describe(device), "copy_bytes_s": copy, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
