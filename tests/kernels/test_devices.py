"""Device facts and the choice of a device by name."""

from dataclasses import replace

import pytest
import torch

from squall.kernels.backends import cpu, device
from squall.kernels.backends.device import (
    Backend,
    DeviceError,
    all_backends,
    backend_of,
    resolve_device,
)

CPU = torch.device("cpu")


def fake_cuda(count: int, reason: str | None = None) -> Backend:
    return replace(
        cpu.BACKEND,
        type="cuda",
        rank=0,
        available=lambda: reason,
        count=lambda: count,
        overrides={},
    )


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "all_backends", lambda: (fake_cuda(2), cpu.BACKEND))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (fake_cuda(0, "no driver"), cpu.BACKEND)
    monkeypatch.setattr(device, "all_backends", lambda: found)


def test_every_backend_file_is_found_in_the_order_of_auto() -> None:
    assert [b.type for b in all_backends()] == ["cuda", "xpu", "mps", "cpu"]
    for backend in all_backends():
        reason = backend.available()
        assert reason is None or (reason and "\n" not in reason)


def test_cpu_facts() -> None:
    backend = backend_of(CPU)
    free, total = backend.memory(CPU)
    assert 0 < free <= total
    assert backend.available() is None
    assert backend.default_dtype(CPU) == torch.float32
    assert "threads" in backend.describe(CPU)
    backend.synchronize(CPU)


def test_backend_of_an_unknown_type() -> None:
    with pytest.raises(DeviceError, match=r"^no backend for device 'meta'; accepted: auto, cuda"):
        backend_of(torch.device("meta"))


@pytest.mark.usefixtures("two_gpus")
def test_resolve_with_gpus() -> None:
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device(" CUDA:1 ") == torch.device("cuda", 1)
    assert resolve_device("cpu:0") == CPU
    with pytest.raises(DeviceError) as error:
        resolve_device("cuda:2")
    assert str(error.value) == (
        "device 'cuda:2' is not there: no such index; usable here: cuda:0, cuda:1, cpu"
    )


@pytest.mark.usefixtures("no_gpu")
def test_resolve_without_gpu() -> None:
    assert resolve_device("auto") == CPU
    with pytest.raises(DeviceError) as error:
        resolve_device("cuda")
    assert str(error.value) == "device 'cuda' is not there: no driver; usable here: cpu"


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "cpu:1:2", "auto:0", "meta"]
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(
        DeviceError, match=r"unknown device .*; accepted: auto, cuda, xpu, mps, cpu"
    ):
        resolve_device(name)


@pytest.mark.gpu
def test_cuda_facts() -> None:
    gpu = resolve_device("cuda")
    backend = backend_of(gpu)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=gpu)
    backend.synchronize(gpu)
    free, total = backend.memory(gpu)
    assert 0 < free < total - held.nbytes // 2
    assert backend.default_dtype(gpu) in (torch.bfloat16, torch.float16)
    assert backend.describe(gpu)
