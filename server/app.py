"""``squall serve``: listen, load, serve, drain."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import uvloop

from squall.server.backend import Backend
from squall.server.errors import unavailable
from squall.server.listener import BindError, HttpServer, bind, is_loopback
from squall.server.messages import Limits
from squall.server.openai import routes
from squall.server.router import Router
from squall.server.state import ServerState

if TYPE_CHECKING:
    from squall.runtime.messages import ModelCard

logger = logging.getLogger("squall.server")

HEALTH_INTERVAL = 0.2  # seconds between two looks at the engine
ERROR_GRACE = 2.0  # seconds for error events to leave before connections are cut

Load = Callable[[], Coroutine[Any, Any, Backend]]


@dataclass(frozen=True)
class ServeOptions:
    """How to serve. Port 0 picks a free one; times in seconds."""

    host: str = "127.0.0.1"
    port: int = 1234
    served_model_names: tuple[str, ...] = ()  # besides the model's own name
    shutdown_timeout: float = 30.0
    keep_alive_comment: float = 15.0  # silence after which a stream gets a comment
    limits: Limits = field(default_factory=Limits)


class _Signals:
    """SIGINT and SIGTERM: the first asks to stop, the second forces it."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.force = asyncio.Event()

    def received(self) -> None:
        if self.stop.is_set():
            self.force.set()
        self.stop.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self.received)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def url_of(listener: socket.socket) -> str:
    """The base URL that reaches ``listener``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ready_line(card: "ModelCard", url: str, seconds: float) -> str:
    """The last line of a start: everything one wants to know about what is being served."""
    return (
        f"Squall ready at {url} | model {card.name} | {card.format} | "
        f"{card.device} ({card.dtype}) | context {card.max_model_len} | "
        f"KV {card.kv_tokens} tokens | {seconds:.1f} s"
    )


def serve(load: Load, options: ServeOptions, *, started: float | None = None) -> int:
    """Serve until told to stop; returns the exit code.

    ``load`` brings up the model. It is awaited on the event loop with the port already bound and
    answering 503, and cancelled by SIGINT and SIGTERM: it must then end what it has started.
    What it raises is raised here. ``started``: the ``perf_counter`` at which start-up began.

    Codes: 0 stopped, every request finished; 1 the engine died, or running requests had to be
    cut; 2 the address cannot be listened on.
    """
    began = perf_counter() if started is None else started
    try:
        sockets = bind(options.host, options.port)
    except BindError as error:
        print(f"squall: {error}", file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_server(load, options, sockets, began))


async def run_server(
    load: Load, options: ServeOptions, sockets: Sequence[socket.socket], began: float
) -> int:
    """The life of a server on bound ``sockets``; see ``serve``."""
    state = ServerState(options.served_model_names, options.keep_alive_comment)
    router = Router(routes(state), loopback_only=is_loopback(options.host))
    server = HttpServer(router, options.limits)
    signals = _Signals()
    backend: Backend | None = None
    with signals.installed():
        await server.start(sockets)
        try:
            backend = await _load(load, signals.stop)
            if backend is None:
                return 0
            state.backend = backend
            gc.collect()
            gc.freeze()  # what exists now lives as long as the server: never scan it again
            line = ready_line(backend.card, url_of(sockets[0]), perf_counter() - began)
            print(line, flush=True)
            return await _serve_until_stopped(server, state, signals, options.shutdown_timeout)
        finally:
            state.draining = True
            await server.close()
            state.close()
            if backend is not None:
                backend.close()


async def _load(load: Load, stop: asyncio.Event) -> Backend | None:
    """The loaded model, or None when told to stop meanwhile."""
    loading = asyncio.create_task(load())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        return loading.result() if loading.done() else None
    finally:
        await _cancel(loading, stopping)


async def _serve_until_stopped(
    server: HttpServer, state: ServerState, signals: _Signals, shutdown_timeout: float
) -> int:
    death = asyncio.create_task(_engine_death(state))
    stop = asyncio.create_task(signals.stop.wait())
    force = asyncio.create_task(signals.force.wait())
    drain = asyncio.create_task(_drain_after(stop, server, state, shutdown_timeout))
    try:
        await asyncio.wait((death, drain, force), return_when=asyncio.FIRST_COMPLETED)
        if not death.done() and drain.done() and drain.result():
            return 0
        if death.done():
            error = unavailable(death.result(), "engine_dead")
        else:
            error = unavailable("the server is shutting down", "draining")
        print(f"squall: {error}; {server.active} requests are cut", file=sys.stderr)
        state.fail_running(error)
        await server.drain(ERROR_GRACE)
        return 1
    finally:
        await _cancel(death, stop, force, drain)


async def _drain_after(
    stop: Awaitable[object], server: HttpServer, state: ServerState, timeout: float
) -> bool:
    await stop
    state.draining = True
    logger.info("shutting down: %d requests to finish", server.active)
    return await server.drain(timeout)


async def _engine_death(state: ServerState) -> str:
    """Returns why the engine died, once it has."""
    while True:
        assert state.backend is not None
        reason = state.backend.unhealthy()
        if reason is not None:
            return reason
        await asyncio.sleep(HEALTH_INTERVAL)


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel what is still running and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
