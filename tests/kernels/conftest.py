"""Kernel tests: results can start as NaN, and are compared under one table of limits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import pytest
import torch
from torch.utils import deterministic

from squall.kernels.cases import Case, relative_error


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The problems are small: threads cost more than they give, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned() -> AbstractContextManager[None]:
    """While entered, ``torch.empty`` gives NaN: an element nobody writes shows."""
    return _poisoned()


class CheckResults(Protocol):
    def __call__(
        self,
        case: Case,
        got: tuple[torch.Tensor, ...],
        want: tuple[torch.Tensor, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None: ...


@pytest.fixture
def check_results() -> CheckResults:
    """Compare results under the one table of error limits; ``dtype`` is what the case was built
    for."""

    def check(
        case: Case,
        got: tuple[torch.Tensor, ...],
        want: tuple[torch.Tensor, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert len(got) == len(want) > 0
        for i, (actual, expected) in enumerate(zip(got, want, strict=True)):
            if not actual.dtype.is_floating_point:
                assert torch.equal(actual.cpu(), expected), f"{case.name}, result {i}"
                continue
            error, limit = relative_error(actual, expected), case.error_limit(actual.dtype, dtype)
            assert error <= limit, f"{case.name}, result {i}: error {error:.2e} over {limit:.0e}"

    return check
