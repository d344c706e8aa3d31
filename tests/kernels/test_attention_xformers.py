"""xformers as an attention backend: what it refuses, and on a GPU that has it, its results."""

import sys
from collections.abc import Iterator

import pytest
import torch

from squall.kernels.attention import xformers_backend as backend
from squall.kernels.attention.paged import build_batch, paged_attention_reference
from squall.kernels.cases import ERROR_LIMITS, relative_error

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    backend.probe.cache_clear()
    yield
    backend.probe.cache_clear()


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.probe() == "xformers needs a CUDA GPU"


def test_needs_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert backend.probe() == "xformers' paged attention needs compute capability 8.0"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert backend.probe() == "xformers is not installed"


@pytest.mark.parametrize(
    ("dim", "block", "dtypes", "features", "reason"),
    [
        (128, 32, (BF16, BF16), set(), None),
        (64, 16, (torch.float16, torch.float16), set(), None),
        (128, 32, (BF16, BF16), {"window", "sinks"}, "no sinks, no window"),
        (80, 32, (BF16, BF16), set(), "no heads of 80; it has 64, 128, 256"),
        (128, 8, (BF16, BF16), set(), "no blocks of 8 tokens; it has 16, 32, 64"),
        (128, 32, (torch.float32, torch.float32), set(), "not torch.float32 and torch.float32"),
        (128, 32, (BF16, torch.float8_e4m3fn), set(), "not torch.bfloat16 and torch.float8_e4m3fn"),
    ],
)
def test_refusals(
    dim: int,
    block: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    features: set[str],
    reason: str | None,
) -> None:
    got = backend.refusal(dim, block, dtypes, features)
    assert got is None if reason is None else reason in str(got)


@pytest.mark.parametrize(("window", "name"), [(8, "no window"), (-8, "has no chunks, no sinks")])
def test_a_refused_call_says_why(window: int, name: str) -> None:
    args = build_batch(((1, 20),), (4, 2, 64), 16, (window, 2.0), BF16, CPU, "sinks")
    with pytest.raises(ValueError, match=name):
        backend.paged_attention(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [((1, 700), (1, 33), (1, 1)), ((40, 40), (1, 90), (7, 300))])
@pytest.mark.parametrize("dim", [64, 128])
def test_results(lengths: tuple[tuple[int, int], ...], dim: int) -> None:
    reason = backend.probe()
    if reason is not None:
        pytest.skip(reason)
    want = paged_attention_reference(*build_batch(lengths, (8, 2, dim), 32, (0, 0.0), BF16, CPU))
    args = list(build_batch(lengths, (8, 2, dim), 32, (0, 0.0), BF16, torch.device("cuda")))
    for i in (1, 2):  # xformers reads unused slots, which a real cache fills with numbers
        args[i] = args[i].nan_to_num()
    assert relative_error(backend.paged_attention(*args), want) <= ERROR_LIMITS[BF16]
