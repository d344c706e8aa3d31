"""The registration helper, and kernel files without Triton."""

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from squall.kernels.op import _on_its_device, multiprocessors, op, override


def _double(x: Tensor) -> Tensor:
    return x * 2


def test_op_runs_the_reference_and_an_override_replaces_it_for_one_device() -> None:
    double = op("test_double(Tensor x) -> Tensor", _double)
    x = torch.ones(3)
    assert double(x).tolist() == [2, 2, 2]
    assert double(x.to("meta")).shape == (3,)
    override("test_double", "CPU", lambda x: x * 3)
    assert double(x).tolist() == [3, 3, 3]
    assert double(x.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match="already has an implementation for CPU"):
        override("test_double", "CPU", lambda x: x * 4)


def test_registering_twice_gives_the_same_operator() -> None:
    first = op("test_twice(Tensor x) -> Tensor", _double)
    assert op("test_twice(Tensor x) -> Tensor", lambda x: x * 9) is first
    assert first(torch.ones(1)).item() == 2
    with pytest.raises(
        ValueError, match=r"test_twice is registered as .*Tensor x\) -> Tensor, not"
    ):
        op("test_twice(Tensor x, int n) -> Tensor", _double)


def test_launcher_serves_accelerators_and_not_the_cpu() -> None:
    op("test_launched(Tensor x) -> Tensor", _double, launcher=_double)
    for key, expected in (("CUDA", True), ("XPU", True), ("CPU", False), ("MPS", False)):
        found = torch._C._dispatch_has_kernel_for_dispatch_key("squall::test_launched", key)
        assert found is expected, key


def test_launches_on_the_device_of_the_first_argument() -> None:
    entered: list[int] = []

    def enter(index: int) -> AbstractContextManager[None]:
        entered.append(index)
        return nullcontext()

    current = -1  # what tensors on the CPU say they are on
    module = SimpleNamespace(__name__="torch.x", device=enter, current_device=lambda: current)
    run = _on_its_device(lambda x, n: n, module)
    assert run(torch.ones(1), 5) == 5
    assert entered == []
    current = 3
    assert run(torch.ones(1), 6) == 6
    assert entered == [-1]


def test_fake_is_used_under_tracing() -> None:
    def reads_values(x: Tensor) -> Tensor:
        return torch.zeros(int(x.sum().item()))

    def fake(x: Tensor) -> Tensor:
        return torch.empty(7)

    sized = op("test_sized(Tensor x) -> Tensor", reads_values, fake=fake)
    assert sized(torch.ones(3)).shape == (3,)
    with torch._subclasses.FakeTensorMode():
        assert sized(torch.ones(3)).shape == (7,)


def test_multiprocessors_of_something_else_than_a_gpu() -> None:
    assert multiprocessors(torch.device("cpu")) == 132


def test_kernels_work_without_triton() -> None:
    """A fresh process in which Triton cannot be imported: references run, a launch explains."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from squall.kernels import activation, lang, rmsnorm
from squall.kernels.attention import paged, rope_store
assert not lang.HAS_TRITON
x = torch.ones(2, 4)
assert activation.silu_mul(x).shape == (2, 2)
try:
    activation.silu_mul_launcher(x)
except RuntimeError as error:
    print(error)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "kernel _gated_kernel needs Triton, which is not installed"
