"""``tools/tune.py`` with a timer that needs no GPU."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squall.bench import problems
from squall.bench.problems import DeviceLostError, Found, GraphTimer, find_problems
from squall.kernels.tuning import Config, Problem, Tunable
from squall.loaders.progress import NoProgress
from squall.tools import tune

HEAD = {"device": "NVIDIA H100", "torch": "2.11", "triton": "3.6", "date": "2026-01-02"}
CANDIDATES = ({"block": 64, "warps": 4}, {"block": 128, "warps": 8}, {"block": 256, "warps": 8})


def never(device: torch.device) -> Callable[[Config], None]:
    raise AssertionError("a fake timer builds nothing")


def found(kernel: str, key: str, candidates: Sequence[Config] = CANDIDATES) -> Found:
    return Found(kernel, Problem(key, 3_000_000, never, candidates))


def by_block(problem: Problem, configs: Sequence[Config]) -> list[float | str]:
    """The larger the block the faster, until it is too large."""
    times = {64: 4e-6, 128: 2e-6, 256: "OutOfResources: shared memory"}
    return [times[config["block"]] for config in configs]


def nothing_ahead(found: Sequence[Found], seconds: float) -> Mapping[str, Mapping[int, str]]:
    return {}


class Clock:
    """Advances by a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def run(
    entries: Sequence[Found],
    timer: tune.Timer = by_block,
    ahead: tune.Precompile = nothing_ahead,
    limit: float = 1e9,
) -> list[tune.Tuned]:
    results: list[tune.Tuned] = []
    count = tune.tune(entries, timer, ahead, results.append, limit, NoProgress(), Clock())
    assert count == len(results)
    return results


def test_candidates_are_ranked_and_those_that_cannot_run_dropped() -> None:
    (result,) = run([found("gemv", "n1")])
    assert result.ranking == ((CANDIDATES[1], 2e-6), (CANDIDATES[0], 4e-6))
    assert result.failures == ("OutOfResources: shared memory",)
    line = "gemv/n1      2.00 us  1.50 TB/s  block=128 warps=8 | 4.00 us block=64 warps=4"
    assert result.line(7) == line + " | 1 cannot run"


def test_a_problem_nothing_can_run() -> None:
    (result,) = run([found("gemv", "n1", CANDIDATES[2:])])
    assert result.line(8) == "gemv/n1  no candidate runs: OutOfResources: shared memory"


def test_what_failed_to_compile_is_not_timed() -> None:
    def ahead(entries: Sequence[Found], seconds: float) -> Mapping[str, Mapping[int, str]]:
        return {"gemv/n1": {1: "CompilationError: no"}}

    def timer(problem: Problem, configs: Sequence[Config]) -> list[float | str]:
        assert CANDIDATES[1] not in configs or problem.key != "n1"
        return by_block(problem, configs)

    first, second = run([found("gemv", "n1"), found("gemv", "n2")], timer, ahead)
    assert first.ranking == ((CANDIDATES[0], 4e-6),)
    assert first.failures == ("CompilationError: no", "OutOfResources: shared memory")
    assert second.ranking[0][0] == CANDIDATES[1]


def test_the_limit_ends_it_between_problems() -> None:
    entries = [found("gemv", f"n{i}") for i in range(10)]
    assert 0 < len(run(entries, limit=5)) < 10
    assert run(entries, limit=0) == []


def test_compiling_ahead_gets_a_round_and_part_of_the_time() -> None:
    asked: list[tuple[int, float]] = []

    def ahead(entries: Sequence[Found], seconds: float) -> Mapping[str, Mapping[int, str]]:
        asked.append((len(entries), seconds))
        return {}

    run([found("gemv", f"n{i}") for i in range(tune.ROUND + 1)], ahead=ahead, limit=1000)
    assert [count for count, _ in asked] == [tune.ROUND, 1]
    assert 0 < asked[1][1] < asked[0][1] < 1000


def test_the_table_grows_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    old = {**HEAD, "date": "2025-01-01", "kernels": {"gemm": {"k": {"b": 1}}, "gemv": {"n1": {}}}}
    path.write_text(json.dumps(old))
    table = tune.TableFile(path, HEAD)
    keys: list[Any] = []

    def keep(result: tune.Tuned) -> None:
        table.add(result)
        keys.append(sorted(json.loads(path.read_text())["kernels"]["gemv"]))

    entries = [found("gemv", "n1"), found("gemv", "n2"), found("gemv", "n3", CANDIDATES[2:])]
    tune.tune(entries, by_block, nothing_ahead, keep, 1e9, NoProgress(), Clock())
    assert keys == [["n1"], ["n1", "n2"], ["n1", "n2"]]
    best = {"n1": CANDIDATES[1], "n2": CANDIDATES[1]}
    expected = {**HEAD, "kernels": {"gemm": {"k": {"b": 1}}, "gemv": best}}
    assert json.loads(path.read_text()) == expected
    assert '   "n1": {"block": 128, "warps": 8},\n' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_another_devices_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**HEAD, "device": "NVIDIA A100", "kernels": {}}))
    with pytest.raises(ValueError, match="is a table of NVIDIA A100, not NVIDIA H100"):
        tune.TableFile(path, HEAD)


def test_a_lost_device_ends_it_and_keeps_what_there_is() -> None:
    def timer(problem: Problem, configs: Sequence[Config]) -> list[float | str]:
        if problem.key == "n2":
            raise DeviceLostError("n2 with block=64: illegal memory access")
        return by_block(problem, configs)

    results: list[tune.Tuned] = []
    with pytest.raises(DeviceLostError, match="n2"):
        tune.tune(
            [found("gemv", "n1"), found("gemv", "n2")],
            timer,
            nothing_ahead,
            results.append,
            1e9,
            NoProgress(),
            Clock(),
        )
    assert [result.found.name for result in results] == ["gemv/n1"]


class FakeGraphs:
    """``torch.cuda`` as ``GraphTimer`` uses it; a launch takes as many microseconds as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # milliseconds
        self.capturing: list[float] | None = None
        self.lost = False
        graphs = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = graphs.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            def capture_begin(self) -> None:
                self.launches = graphs.capturing = []

            def capture_end(self) -> None:
                graphs.capturing = None

            def replay(self) -> None:
                graphs.now += sum(self.launches) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=int))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def synchronize(self, device: torch.device) -> None:
        if self.lost:
            raise RuntimeError("illegal memory access\nmore")

    def build(self, device: torch.device) -> Callable[[Config], None]:
        def launch(config: Config) -> None:
            if config["us"] == 0:
                raise ValueError("too large")
            self.lost = config["us"] < 0
            if self.lost:
                raise RuntimeError("launch failed")
            if self.capturing is not None:
                self.capturing.append(config["us"])

        return launch


def test_launches_are_timed_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = FakeGraphs(monkeypatch)
    timer = GraphTimer(torch.device("cuda"))
    problem = Problem("n1", 3_000_000, graphs.build, ())
    fast, bad, slow = timer(problem, [{"us": 2}, {"us": 0}, {"us": 5}])
    assert (fast, slow) == (pytest.approx(2e-6), pytest.approx(5e-6))
    assert bad == "ValueError: too large"
    assert (
        timer(Problem("n2", 1, never, ()), [{}, {}])
        == ["AssertionError: a fake timer builds nothing"] * 2
    )
    with pytest.raises(DeviceLostError, match=r"^n1 with us=-1: RuntimeError: illegal memory acc"):
        timer(problem, [{"us": 2}, {"us": -1}])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--device", "cpu"]) == 2
    assert "CUDA graphs, which cpu does not have" in capsys.readouterr().err


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense and a quantised kernel with a problem for each shape."""

    def shaped(kernel: str) -> Tunable:
        def of(shapes: Sequence[tuple[int, int]]) -> list[Problem]:
            return [Problem(f"n{n}-k{k}", n * k, never, CANDIDATES) for n, k in shapes]

        return Tunable(kernel, of)

    both = ((shaped("linear"), False), (shaped("planes"), True))
    monkeypatch.setattr(problems, "_tunables", lambda: iter(both))
    find_problems.cache_clear()
    yield
    find_problems.cache_clear()


@pytest.mark.usefixtures("two_kernels")
def test_problems_of_models_are_found_once_and_selected_by_pattern() -> None:
    both = find_problems(("llama-3.1-8b", "mistral-7b"), "linear")
    assert [entry.name for entry in both] == [
        "linear/n6144-k4096",
        "linear/n4096-k4096",
        "linear/n28672-k4096",
        "linear/n4096-k14336",
        "linear/n128256-k4096",
        "linear/n32768-k4096",
    ]
    values = find_problems(("llama-3.1-8b",), "*/n1024-*")
    assert [entry.name for entry in values] == ["planes/n1024-k4096"]
    with pytest.raises(ValueError, match="matches 'gemm'; kernels with problems: linear, planes"):
        find_problems(("llama-3.1-8b",), "gemm")
