"""Listening sockets and the server that ties them to connections."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence

from squall.server.http import HttpProtocol
from squall.server.messages import Handler, Limits, ResponseHead

BACKLOG = 2048


class BindError(Exception):
    """The address cannot be listened on; the message is one line."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address ``host`` stands for; port 0 picks one free port for all.

    Done before a model is loaded, so that a taken port costs nobody a minute. Raises BindError.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except (OSError, UnicodeError) as error:
        raise BindError(f"cannot listen on host {host!r}: {error}; is the name right?") from None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind(address)
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in sockets:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BindError(
                f"port {port} on {host} is already in use; choose another one with --port"
            ) from None
        raise BindError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return sockets


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HttpServer:
    """Accepts connections on bound sockets and hands their requests to ``app``."""

    def __init__(self, app: Handler, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.head = ResponseHead()
        self.draining = False
        self.active = 0  # requests being answered
        self._connections: set[HttpProtocol] = set()
        self._servers: list[asyncio.Server] = []
        self._changed = asyncio.Event()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept on ``sockets`` (from ``bind``)."""
        loop = asyncio.get_running_loop()
        for listener in sockets:
            self._servers.append(
                await loop.create_server(
                    lambda: HttpProtocol(self, loop), sock=listener, backlog=BACKLOG
                )
            )

    async def drain(self, timeout: float) -> bool:
        """Finish the requests being answered, for at most ``timeout`` seconds.

        New requests still reach ``app`` (which refuses them), each on its connection's last
        exchange. Returns whether all of them finished.
        """
        self.draining = True
        return await self._wait(lambda: self.active == 0, timeout)

    async def close(self, timeout: float = 1.0) -> None:
        """Stop accepting, flush for at most ``timeout`` seconds, then cut what is left."""
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.shut_down()
        if not await self._wait(lambda: not self._connections, timeout):
            for connection in list(self._connections):
                connection.abort()
            await self._wait(lambda: not self._connections, timeout)

    async def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    # -- called by connections ---------------------------------------------------------------

    def opened(self, connection: HttpProtocol) -> bool:
        self._connections.add(connection)
        return len(self._connections) <= self.limits.max_connections

    def closed(self, connection: HttpProtocol) -> None:
        self._connections.discard(connection)
        self._changed.set()

    def exchange_started(self) -> None:
        self.active += 1

    def exchange_ended(self) -> None:
        self.active -= 1
        self._changed.set()
