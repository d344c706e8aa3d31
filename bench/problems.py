"""The kernels' own problems (``TUNABLE`` in their files), and how one launch of them is timed."""

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from statistics import median

import torch

from squall import kernels
from squall.bench.cases import case_config, weight_shapes
from squall.kernels.tuning import Config, Problem, Tunable

CASES = ("llama-3.1-8b", "llama-3.2-1b", "mistral-7b")  # whose weight shapes are tuned for

# One replay of a graph: long beside its own launch, short enough for hundreds of candidates.
_REPLAY_S = 0.6e-3
_REPLAYS = 5
_MAX_LAUNCHES = 128
# What is expected of a launch before it was timed, to choose how many of them make a replay.
_BYTES_S = 3e12
_LAUNCH_S = 1.5e-6


class DeviceLostError(Exception):
    """A launch left the device unusable for this process; the message is one line."""


@dataclass(frozen=True)
class Found:
    """A problem and the kernel it belongs to."""

    kernel: str
    problem: Problem

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.problem.key}"


@cache
def find_problems(cases: Sequence[str] = CASES, pattern: str = "*") -> tuple[Found, ...]:
    """Problems of all kernels for the weight shapes of ``cases`` (a tuple), each once.

    ``pattern`` (a shell pattern) selects by kernel name or by "kernel/key". ``ValueError`` for an
    unknown case, or when nothing is selected.
    """
    found: dict[str, Found] = {}
    names = set()
    for tunable, split_values in _tunables():
        names.add(tunable.kernel)
        for case in cases:
            for problem in tunable.problems(weight_shapes(case_config(case), split_values)):
                entry = Found(tunable.kernel, problem)
                if fnmatchcase(entry.kernel, pattern) or fnmatchcase(entry.name, pattern):
                    found.setdefault(entry.name, entry)
    if not found:
        known = ", ".join(sorted(names)) or "none"
        raise ValueError(f"no problem matches {pattern!r}; kernels with problems: {known}")
    return tuple(found.values())


def _tunables() -> Iterator[tuple[Tunable, bool]]:
    """What kernel files offer as ``TUNABLE`` or ``TUNABLES``; imports all kernels.

    The second value is true for quantised weights: there v often has a type of its own, and so is
    a product of its own.
    """
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if module.name.startswith(f"{kernels.__name__}.backends"):
            continue
        loaded = importlib.import_module(module.name)
        single = getattr(loaded, "TUNABLE", None)
        offered = (*(() if single is None else (single,)), *getattr(loaded, "TUNABLES", ()))
        for tunable in offered:
            yield tunable, module.name.startswith(f"{kernels.__name__}.quant.")


class GraphTimer:
    """Times launches in CUDA graphs: many of them one behind the other, as in a decode step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, problem: Problem, configs: Sequence[Config]) -> list[float | str]:
        """For every config the seconds of a launch, or why it cannot run, in one line.

        Raises ``DeviceLostError`` when nothing can run any more.
        """
        expected = problem.nbytes / _BYTES_S + _LAUNCH_S
        launches = min(_MAX_LAUNCHES, math.ceil(_REPLAY_S / expected))
        try:
            return self._time_all(problem, configs, launches)
        finally:  # the graphs' memory would otherwise pile up
            torch.cuda.empty_cache()

    def _time_all(
        self, problem: Problem, configs: Sequence[Config], launches: int
    ) -> list[float | str]:
        try:
            run = problem.build(self._device)
            torch.cuda.synchronize(self._device)
        except Exception as error:
            self._check_device(problem.key, error)
            return [first_line(error)] * len(configs)
        found: list[float | str] = []
        for config in configs:
            try:
                found.append(self._time(run, config, launches))
            except Exception as error:
                self._check_device(f"{problem.key} with {config_text(config)}", error)
                found.append(first_line(error))
        return found

    def _check_device(self, where: str, error: Exception) -> None:
        try:
            torch.cuda.synchronize(self._device)
        except Exception as lost:
            raise DeviceLostError(f"{where}: {first_line(lost)}") from error

    def _time(self, run: Callable[[Config], None], config: Config, launches: int) -> float:
        with torch.cuda.stream(self._stream):
            run(config)  # compiles, and fails where a config asks for too much
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # not torch.cuda.graph(): its garbage collection takes longer than the measurement
            graph.capture_begin()
            try:
                for _ in range(launches):
                    run(config)
            finally:
                graph.capture_end()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            graph.replay()
            times = []
            for _ in range(_REPLAYS):
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        return median(times) / 1e3 / launches


def config_text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items()) or "-"


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
