"""Ways to reach an engine: in a thread of this process, or in a process of its own."""

import asyncio
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from squall.loaders.errors import ModelLoadError
from squall.loaders.progress import Advance, Progress
from squall.runtime.engine import Engine, run_loop
from squall.runtime.messages import (
    Abort,
    Events,
    Failed,
    FrameReader,
    FromEngine,
    Load,
    ModelCard,
    Phase,
    Stop,
    Submit,
    ToEngine,
    encode_frame,
)
from squall.runtime.request import EngineRequest, TokenEvent

log = logging.getLogger(__name__)

OnEvents = Callable[[list[TokenEvent]], None]
OnDeath = Callable[[str], None]


class EngineClient(Protocol):
    """What a front-end needs from an engine, wherever it runs."""

    def listen(self, on_events: OnEvents, on_death: OnDeath) -> None:
        """Where the engine's news go; called once, before the first request."""
        ...

    def submit(self, request: EngineRequest) -> None: ...

    def abort(self, request_id: int) -> None: ...

    def close(self) -> None: ...


class ThreadEngine:
    """An engine in a thread of this process; events arrive on that thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def listen(self, on_events: OnEvents, on_death: OnDeath) -> None:
        def work() -> None:
            try:
                run_loop(self._engine, lambda block: self._receive(block, on_events), on_events)
            except BaseException as error:
                log.debug("the engine stopped", exc_info=True)
                on_death(f"the engine stopped: {type(error).__name__}: {error}")
            else:
                on_death("the engine was closed")

        self._thread = threading.Thread(target=work, name="squall-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        self._inbox.put(Submit(request))

    def abort(self, request_id: int) -> None:
        self._inbox.put(Abort(request_id))

    def close(self) -> None:
        self._inbox.put(Stop())
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _receive(self, block: bool, on_events: OnEvents) -> bool:
        while True:
            try:
                message = self._inbox.get(block)
            except queue.Empty:
                return True
            if not dispatch(self._engine, message, on_events):
                return False
            block = False


def dispatch(engine: Engine, message: ToEngine, emit: OnEvents) -> bool:
    """Carry one message to the engine; False when it is the last."""
    event: TokenEvent | None = None
    if isinstance(message, Submit):
        event = engine.add(message.request)
    elif isinstance(message, Abort):
        event = engine.abort(message.id)
    if event is not None:
        emit([event])
    return not isinstance(message, Stop)


class ProcessEngine:
    """An engine in a child process; events arrive on the asyncio loop given to ``attach``.

    The only connection is one inherited socket pair. The child ends when its end is closed, so
    it cannot outlive this process.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._reader = FrameReader(FromEngine)
        self._socket, child = socket.socketpair()
        command = [sys.executable, "-m", "squall.runtime.worker", str(child.fileno())]
        with child:
            self._process = subprocess.Popen(
                command, pass_fds=[child.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
            )
        self._on_events: OnEvents = lambda events: None
        self._on_death: OnDeath = lambda reason: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent = bytearray()

    def start(self, progress: Progress) -> ModelCard:
        """Load the model; blocks until it is ready. Raises ModelLoadError with the engine's
        reason (any other start-up failure too)."""
        try:
            self._socket.sendall(encode_frame(self._load))
            return self._await_card(progress)
        except BaseException:
            self.close()
            raise

    def _await_card(self, progress: Progress) -> ModelCard:
        open_phases: dict[str, tuple[ExitStack, Advance]] = {}
        with ExitStack() as stack:
            while True:
                data = self._socket.recv(1 << 16)
                if not data:
                    code = self._process.wait()
                    raise ModelLoadError(f"the engine process ended with code {code} while loading")
                for message in self._reader.feed(data):
                    if isinstance(message, ModelCard):
                        return message
                    if isinstance(message, Failed):
                        raise StartupError(message)
                    if isinstance(message, Phase):
                        _show(message, progress, open_phases, stack)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver events on ``loop`` from now on."""
        self._loop = loop
        self._socket.setblocking(False)
        loop.add_reader(self._socket.fileno(), self._readable)

    def listen(self, on_events: OnEvents, on_death: OnDeath) -> None:
        self._on_events, self._on_death = on_events, on_death

    def submit(self, request: EngineRequest) -> None:
        self._send(Submit(request))

    def abort(self, request_id: int) -> None:
        self._send(Abort(request_id))

    def kill(self) -> None:
        """End the child at once, by force. From any thread; a waiting ``start`` fails then."""
        self._process.kill()

    def close(self) -> None:
        """End the child, by force if it does not follow."""
        self._detach()
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _detach(self) -> None:
        if self._loop is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._loop = None

    def _send(self, message: ToEngine) -> None:
        if self._loop is None:
            return  # the engine is gone; its death has been reported
        self._unsent += encode_frame(message)
        self._flush()

    def _flush(self) -> None:
        assert self._loop is not None
        try:
            sent = self._socket.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._die(str(error))
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._die(f"exit code {self._process.poll()}")
            return
        for message in self._reader.feed(data):
            if isinstance(message, Events):
                self._on_events(message.events)
            elif isinstance(message, Failed):
                self._die(message.error)
                return

    def _die(self, reason: str) -> None:
        self._detach()
        self._on_death(f"the engine stopped: {reason}")


class StartupError(ModelLoadError):
    """The engine process could not start; ``traceback`` is the child's."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.error)
        self.kind = failed.kind
        self.traceback = failed.traceback


def _show(
    message: Phase,
    progress: Progress,
    phases: dict[str, tuple[ExitStack, Advance]],
    stack: ExitStack,
) -> None:
    """Replay the child's progress here."""
    if message.name not in phases:
        own = stack.enter_context(ExitStack())
        advance = own.enter_context(progress.phase(message.name, message.total, message.unit))
        phases[message.name] = (own, advance)
    own, advance = phases[message.name]
    if message.advance:
        advance(message.advance)
    if message.done:
        own.close()
        del phases[message.name]
