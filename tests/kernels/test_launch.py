"""Direct launches: they start what Triton would start, and only what it started before."""

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from squall.kernels import launch
from squall.kernels.cases import Case, all_cases, results
from squall.kernels.lang import TensorDescriptor, tl
from squall.kernels.launch import Kernel, current_device_of, kernel

Started = tuple[Any, ...]  # what a launcher was called with


class Driver:
    """A chip that is not there: kernels are compiled, loaded under a new number, and not run."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.loaded = 0
        self.launcher_cls = lambda source, metadata: lambda *args: self.started.append(args)
        properties = {"max_shared_mem": 227 << 10}
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: properties
        )
        self.device = 0

    def _load(self, *_: object) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return 0, self.loaded, 32, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 70 + device


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    return made


def _body(x_ptr, y_ptr, count, stride, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr = 32):
    at = tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x_ptr + at * stride, mask=mask, other=0.0) * scale + FLAG * 1.0
    if y_ptr is not None:
        tl.store(y_ptr + at, value, mask=mask)


class Probe:
    """A fresh kernel, and how often it went through Triton."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = kernel(_body, do_not_specialize=["count"])
        assert isinstance(made, Kernel)
        self.kernel, self.through_triton = made, 0
        self.run = made.jitted.run
        monkeypatch.setattr(made.jitted, "run", self._counted)

    def _counted(self, *args: Any, **options: Any) -> Any:
        self.through_triton += 1
        return self.run(*args, **options)


@pytest.fixture
def probe(chip: Driver, monkeypatch: pytest.MonkeyPatch) -> Probe:
    return Probe(monkeypatch)


X, Y = torch.zeros(64), torch.zeros(64)
BASE: dict[str, Any] = {
    "x_ptr": X, "y_ptr": Y, "count": 5, "stride": 4, "scale": 2.0, "FLAG": True, "num_warps": 4,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "unaligned": {"x_ptr": X[1:]},
    "another-unaligned": {"y_ptr": Y[1:]},
    "both-unaligned": {"x_ptr": X[1:], "y_ptr": Y[1:]},
    "dtype": {"x_ptr": X.half()},
    "none": {"y_ptr": None},
    "one": {"stride": 1},
    "sixteen": {"stride": 16},
    "seventeen": {"stride": 17},
    "long": {"stride": 2**31},
    "long-count": {"count": 2**31},
    "negative-count": {"count": -1},
    "count-of-one": {"count": 1},
    "integer": {"scale": 2},
    "another-float": {"scale": 3.0},
    "constexpr": {"FLAG": False},
    "type-of-constexpr": {"FLAG": 1},
    "default": {"BLOCK": 64},
    "warps": {"num_warps": 2},
    "stages": {"num_stages": 2},
    "parameter": {"x_ptr": torch.nn.Parameter(X, requires_grad=False)},
}


@kernel
def _described_kernel(x, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, x.load([0, 0]).reshape([BLOCK]), mask=at < size)


def test_descriptors(chip: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(size: int, rows: int, columns: int, dtype: torch.dtype) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(torch.zeros(size, 64, dtype=dtype), [rows, columns])

    variants = [
        (described(size, rows, 256 // rows, dtype), Y, 7, 256)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for rows in (8, 16)
        for size in (32, 48)
    ]
    through_triton = 0
    run = _described_kernel.jitted.run

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal through_triton
        through_triton += 1
        return run(*args, **options)

    monkeypatch.setattr(_described_kernel.jitted, "run", counted)
    for _ in range(2):
        for arguments in variants:
            _described_kernel[(1,)](*arguments)
    assert through_triton == len(variants) // 2  # the size makes no difference
    for arguments, started in zip(variants, chip.started[len(variants) :], strict=True):
        assert _function(started) == run(*arguments, grid=(1,), warmup=True).function
        assert started[9:] == arguments


def _function(started: Started) -> int:
    return int(started[4])


def test_what_is_started_is_what_triton_chooses(chip: Driver, probe: Probe) -> None:
    """Every variant, launched after all others, starts the binary that Triton picks for it."""
    variants = [BASE, *(BASE | change for change in CHANGES.values())]
    for _ in range(2):
        for arguments in variants:
            probe.kernel[(3,)](**arguments)
    assert probe.through_triton <= len(variants)
    chip.started.clear()
    for arguments in variants:
        probe.kernel[(3,)](**arguments)
        wanted = probe.run(grid=(3,), warmup=True, **arguments).function
        assert _function(chip.started[-1]) == wanted, arguments
    assert len({_function(started) for started in chip.started}) > 10
    assert probe.through_triton <= len(variants)


def test_only_the_first_launch_of_a_kind_goes_through_triton(chip: Driver, probe: Probe) -> None:
    def run(count: int, scale: float) -> None:
        probe.kernel[(3,)](X.clone(), Y, count, 4, scale, False, num_warps=4)

    for count, scale in ((5, 2.0), (17, 2.0), (32, -0.5)):
        run(count, scale)
    assert probe.through_triton == 1
    assert [started[11:13] for started in chip.started] == [(5, 4), (17, 4), (32, 4)]
    assert chip.started[2][13:] == (-0.5, False, 32)
    chip.device = 1  # a kernel is loaded on each device
    run(5, 2.0)
    run(5, 2.0)
    assert probe.through_triton == 2
    assert chip.started[-1][3] == 71


@pytest.mark.parametrize(
    ("grid", "sizes"), [((2,), (2, 1, 1)), ((2, 3), (2, 3, 1)), ((2, 3, 4),) * 2]
)
def test_grids(chip: Driver, probe: Probe, grid: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    for _ in range(2):
        probe.kernel[grid](X, Y, 5, 4, 2.0, False)
        assert chip.started[-1][:3] == sizes


def test_keywords_are_put_in_order(chip: Driver, probe: Probe) -> None:
    positional = X, Y, 5, 4, 2.0, False, 64
    names = "BLOCK", "FLAG", "scale", "stride", "count", "y_ptr", "x_ptr"
    probe.kernel[(1,)](*positional, num_warps=4)
    probe.kernel[(1,)](num_warps=4, **dict(zip(names, reversed(positional), strict=True)))
    probe.kernel[(1,)](X, Y, 5, num_warps=4, BLOCK=64, FLAG=False, scale=2.0, stride=4)
    assert probe.through_triton == 1
    assert chip.started[0][9:] == positional
    assert chip.started[1] == chip.started[2]
    assert chip.started[2][9:] == positional
    probe.kernel[(1,)](X, Y, 5, 4, 2.0, False, num_warps=4)
    assert chip.started[-1][-1] == 32  # the default


def test_arguments_that_are_not_understood_go_through_triton(chip: Driver, probe: Probe) -> None:
    for _ in range(2):
        probe.kernel[(1,)](X, Y, 5, 4, 2.0, 1.0)  # a float as a constant
    assert probe.through_triton == 2
    with pytest.raises(TypeError, match="FLAG"):
        probe.kernel[(1,)](X, Y, 5, 4, 2.0)


def test_watched_launches_go_through_triton(
    chip: Driver, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        before = probe.through_triton
        probe.kernel[(1,)](X, Y, 5, 4, 2.0, False)
        return probe.through_triton - before

    assert [run(), run()] == [1, 0]
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hooks.add(print)
        assert run() == 1
        hooks.remove(print)
        assert run() == 0
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        assert run() == 1
    probe.kernel.jitted.add_pre_run_hook(lambda *args, **options: None)
    assert run() == 1
    probe.kernel.jitted.pre_run_hooks.clear()
    with monkeypatch.context() as patch:
        original = JITFunction.run
        patch.setattr(JITFunction, "run", lambda *args, **options: original(*args, **options))
        assert run() == 1
    assert run() == 0


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False)])
def test_direct_starts_pass_on_what_tritons_launcher_does(flags: tuple[bool, bool]) -> None:
    calls: list[Started] = []
    run = object.__new__(CudaLauncher)
    vars(run).update(
        launch=lambda *args: calls.append(args),
        launch_cooperative_grid=flags[0],
        launch_pdl=flags[1],
        num_ctas=1,
        arg_annotations=["annotations"],
        kernel_signature=b"signature",
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
    )
    args = X, None, 5, 2.0, True
    run(2, 3, 4, 7, 8, (4, 1, 512), None, None, None, *args)
    assert launch._INSIDES is not None
    launch._INSIDES.direct_start(run, 8, (4, 1, 512))(2, 3, 4, 7, args)
    assert calls[0] == calls[1]


def test_no_other_device_and_no_other_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch._INSIDES is not None
    assert launch._INSIDES.start_of(None) is None  # what a cache hook may make of a launch
    compiled = SimpleNamespace(metadata=SimpleNamespace(target=GPUTarget("hip", "gfx942", 64)))
    monkeypatch.setattr(launch._INSIDES, "_compiled_kernel", SimpleNamespace)
    assert launch._INSIDES.start_of(compiled) is None
    monkeypatch.setattr(launch, "_INSIDES", None)
    assert isinstance(kernel(_body), JITFunction)


def test_current_device_without_its_check() -> None:
    module = SimpleNamespace(__name__="torch.nothing", current_device=lambda: 3)
    assert current_device_of(module)() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_second_launches_on_a_gpu(
    case: Case, poisoned: AbstractContextManager[None], check_results: Any
) -> None:
    """The other tests on a GPU launch most kernels once, through Triton."""
    want = results(case, case.reference, case.build(torch.float16, torch.device("cpu")))
    with poisoned:
        for _ in range(2):
            args = case.build(torch.float16, torch.device("cuda"))
            got = results(case, case.op, args)
    check_results(case, got, want, torch.float16)
