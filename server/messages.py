"""What passes between the HTTP protocol and the handlers: requests, responses, limits.

A handler is an async function ``(Request) -> Response | StreamingResponse``. It is cancelled the
moment its client disconnects.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One complete request. Header names are lower case; repeated ones are joined by ``, ``."""

    method: str
    path: str  # as sent (percent-encoded), without the query
    query: str
    host: str  # the authority the client asked for: ``Host``, or an absolute-form target's
    headers: dict[str, str]
    body: bytes
    id: str  # the client's x-request-id, or one made here
    http_1_1: bool = True
    keep_alive: bool = True


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose body is known as a whole."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = JSON
    headers: Headers = ()


class BodyWriter(Protocol):
    """Where a streaming body is written; usable between ``attach`` and ``finish``/``abort``."""

    @property
    def paused(self) -> bool:
        """True while the client reads more slowly than the body is produced."""
        ...

    def write(self, data: bytes) -> None:
        """Send ``data`` (not empty). Never blocks; respect ``paused`` to bound memory."""
        ...

    def finish(self, *, keep_alive: bool = True) -> None:
        """End the body; the connection is closed after it unless ``keep_alive``."""
        ...

    def abort(self) -> None:
        """Cut the connection: what was sent is not a complete response."""
        ...


class BodySource(Protocol):
    """Produces a streaming body by pushing, so that one event costs no task switch."""

    def attach(self, writer: BodyWriter) -> None:
        """The head has been sent: write from now on."""
        ...

    def resume(self) -> None:
        """The client has caught up: ``writer.paused`` turned False."""
        ...

    def abandon(self) -> None:
        """The client is gone: stop producing. The writer must not be used any more."""
        ...


@dataclass(frozen=True, slots=True)
class StreamingResponse:
    """A response whose body is pushed by ``source`` (chunked, or until close in HTTP/1.0)."""

    source: BodySource
    status: int = 200
    content_type: bytes = EVENT_STREAM
    headers: Headers = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


Handler = Callable[[Request], Awaitable[Response | StreamingResponse]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost. Sizes in bytes, times in seconds."""

    max_header_bytes: int = 64 * 1024  # request target and all headers together
    max_header_count: int = 128
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 8192
    max_pipelined: int = 64  # requests waiting behind the one being answered
    header_timeout: float = 30.0  # from a request's first byte (or connecting) to its headers
    body_timeout: float = 30.0  # plus the time that min_body_rate grants for what has arrived
    min_body_rate: int = 16 * 1024  # bytes a second
    keep_alive_timeout: float = 75.0  # between two requests
    write_timeout: float = 120.0  # a client that reads nothing for so long is dropped
    linger_timeout: float = 5.0  # after a complete exchange, for the client's close
    reject_linger_timeout: float = 30.0  # as above, while a refused body is thrown away
    write_high_water: int = 64 * 1024  # unsent bytes at which a streaming body is paused


class ResponseHead:
    """Builds status line and headers from prebuilt pieces; one per server, for the cached date."""

    __slots__ = ("_date", "_second", "_status_lines")

    def __init__(self) -> None:
        self._second = 0
        self._date = b""
        self._status_lines = {
            status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
            for status in HTTPStatus
        }

    def build(
        self,
        response: Response | StreamingResponse,
        request_id: str,
        *,
        keep_alive: bool,
        http_1_1: bool,
    ) -> bytes:
        """The head for ``response``, ending with the empty line (RFC 9112 §2.1)."""
        parts = [
            self._status_lines[response.status],
            b"x-request-id: %b\r\n" % request_id.encode("ascii"),
            self._date_line(),
        ]
        if response.status != 204:
            parts.append(b"content-type: %b\r\n" % response.content_type)
        parts += [b"%b: %b\r\n" % header for header in response.headers]
        if isinstance(response, StreamingResponse):
            if http_1_1:
                parts.append(b"transfer-encoding: chunked\r\n")
        elif response.status != 204:
            parts.append(b"content-length: %d\r\n" % len(response.body))
        if not keep_alive:
            parts.append(b"connection: close\r\n")
        elif not http_1_1:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def _date_line(self) -> bytes:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._date = b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
        return self._date
