"""Progress of start-up on the terminal: bars, or plain lines where nobody would see them move."""

import os
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
    """Bars if ``stream`` (default: standard error) is a terminal, else a line for each phase."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return BarProgress(stream)
    return LineProgress(stream)


class BarProgress:
    """A bar for each open phase; they vanish when the last one closes. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._open = 0
        self._bars: rich.progress.Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """See ``squall.loaders.progress.Progress``."""
        bars = self._acquire()
        task = bars.add_task(name, total=total, unit=unit)
        try:
            yield lambda count: bars.advance(task, count)
        finally:
            bars.remove_task(task)
            self._release()

    def _acquire(self) -> "rich.progress.Progress":
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._stream)
                self._bars.start()
            self._open += 1
            return self._bars

    def _release(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def _bars(stream: TextIO) -> "rich.progress.Progress":
    """Rich is imported where it shows something only: that takes a while."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_state(task), style="progress.download")

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Amount(),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
    )


def _state(task: "rich.progress.Task") -> str:
    """``12.0 MiB of 88.6 MiB, 5.3 MiB/s`` or ``3 of 30``, without the unknown parts."""
    unit = task.fields["unit"]
    text = amount(int(task.completed), unit)
    if task.total is not None:
        text += f" of {amount(int(task.total), unit)}"
    if unit == "B" and task.speed:
        text += f", {amount(int(task.speed), unit)}/s"
    return text


class LineProgress:
    """``download: 88.6 MiB ... done in 3.2 s``, a line for each phase. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._unended: object | None = None  # the phase whose line has no end yet

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """See ``squall.loaders.progress.Progress``."""
        phase = object()
        size = "" if total is None else f" {amount(total, unit)}"
        self._begin(phase, f"{name}:{size} ...")
        began = perf_counter()
        how = "stopped after"
        try:
            yield lambda count: None
            how = "done in"
        finally:
            self._end(phase, name, f"{how} {perf_counter() - began:.1f} s")

    def _begin(self, phase: object, text: str) -> None:
        with self._lock:
            self._write(("" if self._unended is None else "\n") + text)
            self._unended = phase

    def _end(self, phase: object, name: str, text: str) -> None:
        with self._lock:
            if self._unended is phase:
                self._write(f" {text}\n")
            else:  # another phase has begun since: say again what this is about
                self._write(("" if self._unended is None else "\n") + f"{name}: {text}\n")
            self._unended = None

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def amount(count: int, unit: str) -> str:
    """``count`` units as people read them: bytes (unit ``"B"``) as 88.6 MiB."""
    if unit != "B":
        return str(count)
    if count < 1 << 10:
        return f"{count} B"
    value = count / 1024
    for prefix in ("K", "M"):
        if value < 1024:
            return f"{value:.1f} {prefix}iB"
        value /= 1024
    return f"{value:.1f} GiB"
