"""``squall serve``: bringing up the engine while the server already listens."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Protocol

from squall.loaders.progress import Advance, Progress
from squall.runtime.options import EngineOptions
from squall.server.backend import Backend

_END_S: Final = 5.0  # how long a load that is not wanted any more may take to end


class Engine(Protocol):
    """What is needed of the engine's process (``squall.runtime.client.ProcessEngine``)."""

    def attach(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


OnChild = Callable[[Engine], None]
OpenEngine = Callable[[EngineOptions, Progress, OnChild], tuple[Backend, Engine]]


def open_engine(
    options: EngineOptions, progress: Progress, on_child: OnChild
) -> tuple[Backend, Engine]:
    """Load the model into a process of its own; blocks."""
    from squall.kernels.backends.device import resolve_device
    from squall.runtime.startup import open_process

    resolve_device(options.device)  # a wrong name is told before anything is downloaded
    return open_process(options, progress, on_child)


def loader(
    options: EngineOptions, progress: Progress, open_engine: OpenEngine = open_engine
) -> Callable[[], Coroutine[Any, Any, Backend]]:
    """What ``squall.server.app.serve`` calls to get its model."""

    async def load() -> Backend:
        return await _Loading(options, progress, open_engine).result()

    return load


class _Unwanted(BaseException):
    """Raised in the loading thread once its result is not wanted any more."""


class _Loading:
    """A load in a thread that the end of the program does not wait for.

    Cancelled, it kills the engine's process, if there is one yet; a download ends the next time
    it reports progress.
    """

    def __init__(self, options: EngineOptions, progress: Progress, open_engine: OpenEngine) -> None:
        self._options = options
        self._progress = progress
        self._open = open_engine
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[tuple[Backend, Engine]] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._lock = threading.Lock()  # guards the next two
        self._unwanted = False
        self._child: Engine | None = None

    async def result(self) -> Backend:
        threading.Thread(target=self._work, name="squall-load", daemon=True).start()
        try:
            backend, engine = await self._future
        except asyncio.CancelledError:
            self._cancel()
            with contextlib.suppress(TimeoutError):  # stuck: it ends with the program
                await asyncio.wait_for(self._ended.wait(), _END_S)
            if not self._future.cancelled() and self._future.exception() is None:
                self._future.result()[1].close()  # it was ready at the very moment
            raise
        engine.attach(self._loop)
        return backend

    def _cancel(self) -> None:
        with self._lock:
            self._unwanted = True
            child = self._child
        if child is not None:
            child.kill()

    def _work(self) -> None:
        try:
            opened = self._open(self._options, _Checked(self._progress, self._check), self._born)
        except BaseException as error:
            self._tell(self._fail, error)
        else:
            with self._lock:
                unwanted = self._unwanted
            if unwanted:
                opened[1].close()
            self._tell(self._succeed, opened)

    def _check(self) -> None:
        if self._unwanted:
            raise _Unwanted

    def _born(self, child: Engine) -> None:
        with self._lock:
            self._child = child
            unwanted = self._unwanted
        if unwanted:
            child.kill()

    def _tell(self, function: Callable[[Any], None], value: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, value)
        except RuntimeError:  # the loop is closed: the program is ending
            return

    def _fail(self, error: BaseException) -> None:
        self._ended.set()
        if not self._future.done():
            self._future.set_exception(error)

    def _succeed(self, opened: tuple[Backend, Engine]) -> None:
        self._ended.set()
        if self._future.done():
            opened[1].close()
        else:
            self._future.set_result(opened)


class _Checked:
    """Progress that calls ``check`` first, whenever something is reported."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self._progress = progress
        self._check = check

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        self._check()
        with self._progress.phase(name, total, unit) as advance:

            def checked(count: int) -> None:
                self._check()
                advance(count)

            yield checked
