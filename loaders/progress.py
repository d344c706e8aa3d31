"""How long-running steps report progress, without knowing who shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows phases such as download, load and capture."""

    def phase(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Open a phase of ``total`` units (``"B"`` bytes, ``"it"`` items; None: unknown length);
        the value is called with the number of units just finished."""
        ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        yield lambda count: None
