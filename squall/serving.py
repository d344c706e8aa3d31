"""``squall serve``: bringing up the engine while the server already listens."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from squall.loaders.progress import Advance, Progress
from squall.runtime.client import ProcessEngine
from squall.runtime.frontend import Frontend
from squall.runtime.options import EngineOptions
from squall.runtime.startup import open_process

END_SECONDS = 2.0  # how long an interrupted load may take to end


class _Interrupted(BaseException):
    """Raised where a load reports progress, once it is not wanted any more."""


class _Interruptible:
    """Progress that ends the work reporting it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stopped = threading.Event()

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        with self._progress.phase(name, total, unit) as advance:

            def checked(count: int) -> None:
                if self.stopped.is_set():
                    raise _Interrupted
                advance(count)

            yield checked


class _Loading:
    """A load in a thread of its own, which need not end before the process can.

    The engine process ends when this one does, so that an interrupted load leaves nothing.
    """

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        self._options = options
        self._progress = _Interruptible(progress)
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[tuple[Frontend, ProcessEngine]] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="squall-load", daemon=True)

    async def result(self) -> Frontend:
        self._thread.start()
        try:
            frontend, engine = await self._done
        except asyncio.CancelledError:
            self._progress.stopped.set()
            await asyncio.to_thread(self._thread.join, END_SECONDS)
            raise
        engine.attach(self._loop)
        return frontend

    def _work(self) -> None:
        try:
            opened = open_process(self._options, self._progress)
        except BaseException as error:
            self._report(self._fail, error)
            return
        if self._progress.stopped.is_set():
            opened[1].close()
        else:
            self._report(self._succeed, opened)

    def _report(self, function: Callable[[Any], None], value: object) -> None:
        if not self._progress.stopped.is_set():
            self._loop.call_soon_threadsafe(function, value)

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _succeed(self, opened: tuple[Frontend, ProcessEngine]) -> None:
        if self._done.done():
            opened[1].close()
        else:
            self._done.set_result(opened)


def loader(
    options: EngineOptions, progress: Progress
) -> Callable[[], Coroutine[Any, Any, Frontend]]:
    """What ``squall.server.app.serve`` calls to get its model."""

    async def load() -> Frontend:
        return await _Loading(options, progress).result()

    return load
