"""``python tools/tune.py``: find the launch parameters of every kernel on this GPU.

Times each candidate of each problem that kernel files offer (``TUNABLE``) for the weight shapes of
some models, and writes the best to the GPU's table, ``kernels/tuned/<gpu>.json``, where the kernels
look for them. A table that exists is added to. Candidates are compiled by a process per CPU core
first; when ``--limit`` is over, what is done is kept: the file is written problem by problem.
"""

import sys

if __name__ == "__main__":  # tools/tokenize.py must not shadow the standard library's tokenize
    sys.path.pop(0)

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from squall.bench.cases import CASES as ALL_CASES
from squall.bench.machine import describe
from squall.bench.problems import (
    CASES,
    DeviceLostError,
    Found,
    GraphTimer,
    config_text,
    find_problems,
    first_line,
)
from squall.kernels.backends.device import DeviceError, backend_of, resolve_device
from squall.kernels.tuning import Config, Problem, table_path
from squall.loaders.progress import Progress
from squall.progress import make_progress

Timer = Callable[[Problem, Sequence[Config]], list[float | str]]
# Compiles candidates ahead, for at most so many seconds: why those that cannot run cannot, by
# problem name and candidate.
Precompile = Callable[[Sequence[Found], float], Mapping[str, Mapping[int, str]]]

ROUND = 48  # problems compiled, then measured: compiling while measuring would disturb it
_TASK = 4  # candidates a worker compiles before it asks for more
_LATE_S = 15.0  # that a worker may still take when compiling should be over
_COMPILE_SHARE = 0.7  # of the time that is left


@dataclass(frozen=True)
class Tuned:
    """One problem's candidates that ran, fastest first, and why the others did not."""

    found: Found
    ranking: tuple[tuple[Config, float], ...]  # seconds of a launch
    failures: tuple[str, ...]

    def line(self, width: int) -> str:
        """``name us TB/s best | us second-best``."""
        name = f"{self.found.name:<{width}}"
        if not self.ranking:
            return f"{name} no candidate runs: {self.failures[0]}"
        config, seconds = self.ranking[0]
        text = f"{name} {seconds * 1e6:>9.2f} us {self.found.problem.nbytes / seconds / 1e12:>5.2f}"
        text += f" TB/s  {config_text(config)}"
        if len(self.ranking) > 1:
            config, seconds = self.ranking[1]
            text += f" | {seconds * 1e6:.2f} us {config_text(config)}"
        return text + (f" | {len(self.failures)} cannot run" if self.failures else "")


class TableFile:
    """A GPU's table on disk, what others tuned before included.

    ``head`` (device, versions, date) replaces the file's. ``ValueError`` when the file is another
    device's.
    """

    def __init__(self, path: Path, head: Mapping[str, str]) -> None:
        self.path = path
        self._head = head
        self._kernels: dict[str, dict[str, dict[str, int]]] = {}
        if path.is_file():
            data = json.loads(path.read_text())
            if data["device"] != head["device"]:
                raise ValueError(f"{path} is a table of {data['device']}, not {head['device']}")
            self._kernels = data["kernels"]

    def add(self, result: Tuned) -> None:
        """Take the fastest candidate in, and write the file."""
        if not result.ranking:
            return
        rows = self._kernels.setdefault(result.found.kernel, {})
        rows[result.found.problem.key] = dict(result.ranking[0][0])
        written = self.path.with_suffix(".part")
        written.write_text(self._text())
        os.replace(written, self.path)

    def _text(self) -> str:
        """JSON with one line for each problem, for readable diffs."""
        kernels = []
        for kernel, rows in sorted(self._kernels.items()):
            lines = [f"   {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)]
            kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
        head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in self._head.items()]
        body = ' "kernels": {\n' + ",\n".join(kernels) + "\n }"
        return "{\n" + ",\n".join([*head, body]) + "\n}\n"


class Workers:
    """Processes that fill Triton's cache by launching candidates, each on inputs of its own."""

    def __init__(self, cases: tuple[str, ...], pattern: str, device: torch.device) -> None:
        self._key = (cases, pattern, str(device))
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pool = ProcessPoolExecutor(os.cpu_count(), mp_context=spawn)

    def __call__(self, found: Sequence[Found], seconds: float) -> Mapping[str, Mapping[int, str]]:
        """See ``Precompile``."""
        tasks: dict[Future[dict[int, str]], str] = {}
        refused: dict[str, dict[int, str]] = {}
        try:
            for entry in found:
                for first in range(0, len(entry.problem.candidates), _TASK):
                    task = self._pool.submit(compile_candidates, *self._key, entry.name, first)
                    tasks[task] = entry.name
            done, late = wait(tasks, timeout=seconds)
            running = [task for task in late if not task.cancel()]
            done |= wait(running, timeout=_LATE_S).done
            for task in done:
                refused.setdefault(tasks[task], {}).update(task.result())
        except BrokenExecutor as error:  # then the process that measures compiles alone
            print(f"tune: no more compiling ahead: {first_line(error)}", file=sys.stderr)
        return refused

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def compile_candidates(
    cases: tuple[str, ...], pattern: str, device_name: str, name: str, first: int
) -> dict[int, str]:
    """In a worker: launch ``_TASK`` candidates of problem ``name`` once; why some cannot run.

    Whatever else goes wrong here (too little memory for so many processes) is not the candidate's
    fault, and left to the process that measures.
    """
    problem = next(f.problem for f in find_problems(cases, pattern) if f.name == name)
    try:
        return _launch_each(problem, first, torch.device(device_name))
    except Exception as error:
        print(f"tune: compiling {name} ahead: {first_line(error)}", file=sys.stderr)
        return {}
    finally:
        torch.cuda.empty_cache()


def _launch_each(problem: Problem, first: int, device: torch.device) -> dict[int, str]:
    run = problem.build(device)
    refused: dict[int, str] = {}
    for index, config in enumerate(problem.candidates[first : first + _TASK], first):
        try:
            run(config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            refused[index] = first_line(error)
        backend_of(device).synchronize(device)
    return refused


def tune(
    found: Sequence[Found],
    timer: Timer,
    precompile: Precompile,
    keep: Callable[[Tuned], None],
    limit: float,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure problems in order, ``keep`` each result, and return how many there are.

    Stops after ``limit`` seconds, when the problem at hand is done. Raises ``DeviceLostError``.
    """
    end = clock() + limit
    count = 0
    for start in range(0, len(found), ROUND):
        group = found[start : start + ROUND]
        with progress.phase("compile", len(group), "it") as advance:
            refused = precompile(group, max(0.0, _COMPILE_SHARE * (end - clock())))
            advance(len(group))
        with progress.phase("measure", len(group), "it") as advance:
            for entry in group:
                if clock() >= end:
                    return count
                keep(_tune_one(entry, timer, refused.get(entry.name, {})))
                advance(1)
                count += 1
    return count


def _tune_one(entry: Found, timer: Timer, refused: Mapping[int, str]) -> Tuned:
    usable = [c for i, c in enumerate(entry.problem.candidates) if i not in refused]
    times = timer(entry.problem, usable)
    ran = [(c, t) for c, t in zip(usable, times, strict=True) if not isinstance(t, str)]
    failures = [*refused.values(), *(t for t in times if isinstance(t, str))]
    return Tuned(entry, tuple(sorted(ran, key=lambda pair: pair[1])), tuple(failures))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/tune.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--case", nargs="+", choices=ALL_CASES, default=CASES, metavar="NAME", help="models")
    add("--kernel", default="*", help="shell pattern of a kernel, or of kernel/problem")
    add("--limit", type=float, default=3600.0, metavar="SECONDS")
    add("--out", type=Path, metavar="FILE", help="default: this GPU's table")
    add("--device", default="cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    results: list[Tuned] = []
    try:
        device = resolve_device(args.device)
        if device.type != "cuda":
            raise DeviceError(f"kernels are timed in CUDA graphs, which {device} does not have")
        head = _head(device)
        table = TableFile(args.out or table_path(head["device"]), head)
        cases = tuple(args.case)
        found = find_problems(cases, args.kernel)
    except (DeviceError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2

    def keep(result: Tuned) -> None:
        results.append(result)
        table.add(result)

    workers = Workers(cases, args.kernel, device)
    code = 0
    try:
        count = tune(found, GraphTimer(device), workers, keep, args.limit, make_progress())
        print(f"{count} of {len(found)} problems, written to {table.path}", file=sys.stderr)
    except DeviceLostError as error:
        print(f"tune: the device is lost: {error}", file=sys.stderr)
        code = 1
    finally:
        width = max((len(result.found.name) for result in results), default=0)
        for result in results:
            print(result.line(width), flush=True)
        workers.close()
    return code


def _head(device: torch.device) -> dict[str, Any]:
    return {name: describe(device)[name] for name in ("device", "torch", "triton", "date")}


if __name__ == "__main__":
    sys.exit(main())
