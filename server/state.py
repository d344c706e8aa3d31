"""What all handlers share: the loaded model, the server's phase, the running generations."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import squall
from squall.server.backend import Backend
from squall.server.errors import ApiError, unavailable

if TYPE_CHECKING:
    from squall.server.generations import Generations

T = TypeVar("T")

INLINE_CHARACTERS = 8 * 1024  # longer texts are tokenized off the event loop
TEXT_THREADS = 2


class ServerState:
    """Mutable state of one server, touched on the event loop only."""

    def __init__(self, aliases: tuple[str, ...] = (), keep_alive_comment: float = 15.0) -> None:
        """``aliases``: further names the model answers to; ``keep_alive_comment``: seconds of
        silence after which a stream gets a comment."""
        self.aliases = aliases
        self.keep_alive_comment = keep_alive_comment
        self.backend: Backend | None = None  # None while the model is loading
        self.draining = False
        self.running: set[Generations] = set()
        self.version = squall.__version__
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "squall-text")

    def health(self) -> ApiError | None:
        """Why requests cannot be served now, or None."""
        if self.draining:
            return unavailable("the server is shutting down", "draining", 1)
        if self.backend is None:
            return unavailable("the model is still loading", "loading", 5)
        reason = self.backend.unhealthy()
        return None if reason is None else unavailable(reason, "engine_dead")

    def require_backend(self) -> Backend:
        """The loaded model. Raises the 503 of ``health``."""
        problem = self.health()
        if problem is not None:
            raise problem
        assert self.backend is not None
        return self.backend

    def names(self, backend: Backend) -> tuple[str, ...]:
        """The names the model is listed under."""
        return tuple(dict.fromkeys((*self.aliases, backend.card.name)))

    def check_model(self, backend: Backend, name: str | None) -> None:
        """Raises the 404 for a name that is not served; None and ``default`` always are."""
        names = self.names(backend)
        if name is None or name == "default" or name in names:
            return
        served = ", ".join(repr(known) for known in names)
        raise ApiError(
            404,
            f"the model {name!r} does not exist; this server has {served} (or 'default')",
            param="model",
            code="model_not_found",
        )

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call ``function`` on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def work_on(self, size: int, function: Callable[[], T]) -> T:
        """Call ``function``, on a worker thread when it has more than 8 Ki characters to do."""
        return function() if size <= INLINE_CHARACTERS else await self.in_thread(function)

    def fail_running(self, error: ApiError) -> None:
        """End every running generation with ``error``."""
        for generations in list(self.running):
            generations.fail(error)

    def close(self) -> None:
        """Release the worker threads; texts being worked on are abandoned."""
        self._threads.shutdown(wait=False, cancel_futures=True)
