"""The engine process: ``python -m squall.runtime.worker FD`` on one end of a socket pair."""

import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squall.loaders.hub import ModelFiles
from squall.loaders.progress import Advance
from squall.runtime.client import dispatch
from squall.runtime.engine import Engine, run_loop
from squall.runtime.messages import (
    Events,
    Failed,
    FrameReader,
    FromEngine,
    Load,
    Phase,
    Stop,
    ToEngine,
    encode_frame,
)
from squall.runtime.request import TokenEvent
from squall.runtime.startup import build_engine


class _SocketProgress:
    """Sends phases to the front-end, which shows them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        def send(message: FromEngine) -> None:
            self._sock.sendall(encode_frame(message))

        send(Phase(name, total, unit))
        yield lambda count: send(Phase(name, advance=count))
        send(Phase(name, done=True))


class _Link:
    """The worker's side of the connection once the model is loaded."""

    def __init__(self, sock: socket.socket, reader: FrameReader, engine: Engine) -> None:
        self._sock = sock
        self._reader = reader
        self._engine = engine

    def emit(self, events: list[TokenEvent]) -> None:
        self._sock.sendall(encode_frame(Events(events)))

    def receive(self, block: bool) -> bool:
        """Pass on what has arrived; False when the front-end is gone or says stop."""
        while select.select([self._sock], [], [], None if block else 0)[0]:
            data = self._sock.recv(1 << 20)
            if not data:
                return False
            for message in self._reader.feed(data):
                if not dispatch(self._engine, message, self.emit):  # type: ignore[arg-type]
                    return False
            block = False
        return True


def _serve(sock: socket.socket) -> None:
    reader = FrameReader(ToEngine)
    load: Load | None = None
    while load is None:
        data = sock.recv(1 << 16)
        if not data:
            return
        for message in reader.feed(data):
            if isinstance(message, Stop):
                return
            assert isinstance(message, Load)
            load = message
    files = ModelFiles(
        kind=load.kind,
        paths=tuple(Path(path) for path in load.paths),
        folder=Path(load.folder),
        name=load.name,
    )
    engine, card = build_engine(files, load.options, _SocketProgress(sock))
    sock.sendall(encode_frame(card))
    link = _Link(sock, reader, engine)
    run_loop(engine, link.receive, link.emit)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front-end decides when to end
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(sock.fileno(), False)
    try:
        _serve(sock)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the front-end is gone
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        failed = Failed(first or type(error).__name__, type(error).__name__, traceback.format_exc())
        sock.sendall(encode_frame(failed))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
