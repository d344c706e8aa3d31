"""Progress of long steps on stderr: bars on a terminal, otherwise one line per phase."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, TextIO

from squall.loaders.progress import Advance, Progress

if TYPE_CHECKING:
    import rich.progress


def make_progress(stream: TextIO | None = None) -> Progress:
    """The progress display that suits ``stream`` (stderr)."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


class LineProgress:
    """One line when a phase has ended: its amount and time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        done = 0
        lock = threading.Lock()

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        begin = perf_counter()
        yield advance
        seconds = perf_counter() - begin
        print(f"{name}: {amount(done, unit)} in {seconds:.1f} s", file=self._stream, flush=True)


class BarProgress:
    """A bar for every open phase; they vanish with the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._open = 0
        self._bars: rich.progress.Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._stream)
                self._bars.start()
            bars = self._bars
            self._open += 1
            task = bars.add_task(name, total=total, unit=unit)
        try:
            yield lambda count: bars.advance(task, count)
        finally:
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    bars.stop()
                    self._bars = None


def _bars(stream: TextIO) -> "rich.progress.Progress":
    """Rich, imported only where it shows something."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit = task.fields["unit"]
            shown = amount(int(task.completed), unit)
            if task.total is not None:
                shown += f" of {amount(int(task.total), unit)}"
            if task.speed and unit == "B":
                shown += f", {amount(int(task.speed), unit)}/s"
            return Text(shown)

    columns = TextColumn("{task.description}"), BarColumn(), Amount(), TimeRemainingColumn()
    return Progress(*columns, console=Console(file=stream), transient=True)


def amount(count: int, unit: str) -> str:
    """``count`` units as people write them; bytes in powers of 1000."""
    if unit != "B":
        return f"{count} {unit}" if unit != "it" else str(count)
    value = float(count)
    for prefix in ("", "k", "M", "G"):
        if value < 999.95:
            return f"{value:.1f} {prefix}B" if prefix else f"{count} B"
        value /= 1000
    return f"{value:.1f} TB"
