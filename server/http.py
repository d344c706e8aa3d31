"""HTTP/1.1 on a transport: one ``HttpProtocol`` per connection.

Requests are answered strictly in order. While one is being answered the connection is still
read, because that is how a disconnect is noticed; as soon as a further whole request waits,
reading pauses until that one is taken. The connection is closed in stages (send, shut down the
sending side, throw away what still arrives), because closing a socket with unread input resets
it, and the client may then never see the response (RFC 9112 §9.6).
"""

import asyncio
import logging
from collections import deque
from time import perf_counter
from typing import Protocol, cast

from squall.server.errors import ApiError, internal_error
from squall.server.messages import (
    BodySource,
    Handler,
    Limits,
    Request,
    Response,
    ResponseHead,
    StreamingResponse,
)
from squall.server.parser import Phase, RequestParser, make_request_id

logger = logging.getLogger("squall.server")


class ServerContext(Protocol):
    """What all connections of one server share (``squall.server.listener.HttpServer``)."""

    app: Handler
    limits: Limits
    head: ResponseHead
    draining: bool  # connections are closed after the response in progress

    def opened(self, connection: "HttpProtocol") -> bool:
        """Register a connection; False when there are too many."""
        ...

    def closed(self, connection: "HttpProtocol") -> None:
        """Forget a connection."""
        ...

    def exchange_started(self) -> None:
        """A request has been taken."""
        ...

    def exchange_ended(self) -> None:
        """Its response is complete, or its client is gone."""
        ...


class ChunkedWriter:
    """The ``BodyWriter`` of one streaming response: chunked, or until close in HTTP/1.0."""

    __slots__ = ("_chunked", "_connection", "_transport")

    def __init__(
        self, connection: "HttpProtocol", transport: asyncio.Transport, chunked: bool
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._chunked = chunked

    @property
    def paused(self) -> bool:
        return self._connection.write_paused

    def write(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._transport.write(data)

    def finish(self, *, keep_alive: bool = True) -> None:
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self._connection.body_finished(keep_alive=keep_alive and self._chunked)

    def abort(self) -> None:
        self._transport.abort()


class HttpProtocol(asyncio.Protocol):
    """One connection. Attributes are grouped by lifetime."""

    def __init__(self, server: ServerContext, loop: asyncio.AbstractEventLoop) -> None:
        # server
        self._server = server
        self._loop = loop
        self._limits = server.limits
        # connection
        self._transport: asyncio.Transport
        self._parser = RequestParser(server.limits)
        self._waiting: deque[Request | ApiError] = deque()  # an error is always the last
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._read_paused = False
        self._discarding = False  # input is thrown away: refused, or closing
        self._closing = False
        self._lost = False
        self.write_paused = False
        # the request being received
        self._body_started = 0.0  # loop time
        # the exchange being answered
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._source: BodySource | None = None
        self._status = 0
        self._taken_at = 0.0  # perf_counter

    # -- transport callbacks -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.write_high_water)
        if self._server.opened(self):
            self._arm_read_timer(self._limits.header_timeout)
        else:
            self._refuse(ApiError(503, "too many connections", headers=((b"retry-after", b"1"),)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._discarding = True
        self._waiting.clear()
        self._cancel_read_timer()
        self._cancel_write_timer()
        source, task = self._source, self._task
        if source is not None:
            self._source = None
            source.abandon()
        if task is not None:
            task.cancel()
        if self._request is not None:
            self._log_exchange(disconnected=True)
            self._request = None
            self._server.exchange_ended()
        self._server.closed(self)

    def eof_received(self) -> bool | None:
        # A client that closes its socket looks exactly like one that only shuts down its sending
        # side; work for the former must stop at once, so the latter gets no response.
        if not self._closing and (self._request is not None or self._waiting):
            self._transport.abort()
        return None

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        parser = self._parser
        before = (parser.serial, parser.phase)
        try:
            parser.feed(data)
        except ApiError as error:
            self._take_finished()
            self._refuse(error)
            return
        self._take_finished()
        if parser.ended:
            self._discarding = True
        if (parser.serial, parser.phase) != before:
            self._phase_changed()

    def pause_writing(self) -> None:
        self.write_paused = True
        self._write_timer = self._loop.call_later(self._limits.write_timeout, self._transport.abort)

    def resume_writing(self) -> None:
        self.write_paused = False
        self._cancel_write_timer()
        if self._source is not None:
            self._source.resume()
        elif self._request is None:
            self._next()

    # -- receiving ---------------------------------------------------------------------------

    def _take_finished(self) -> None:
        finished = self._parser.finished
        if finished:
            self._waiting.extend(finished)
            finished.clear()
            self._next()
            if self._waiting and not self._read_paused:
                self._read_paused = True
                self._transport.pause_reading()

    def _phase_changed(self) -> None:
        parser, limits = self._parser, self._limits
        if self._closing:
            return
        if parser.phase is Phase.HEAD:
            self._arm_read_timer(limits.header_timeout)
        elif parser.phase is Phase.BODY:
            self._body_started = self._loop.time()
            self._arm_read_timer(limits.body_timeout)
            self._continue_if_due()
        elif self._request is None:
            self._arm_read_timer(limits.keep_alive_timeout)
        else:
            self._cancel_read_timer()

    def _continue_if_due(self) -> None:
        if self._parser.continue_due and self._request is None and not self._waiting:
            self._parser.continue_due = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_timed_out(self) -> None:
        parser, limits = self._parser, self._limits
        self._read_timer = None
        if self._closing:
            self._transport.abort()
        elif self._read_paused or parser.continue_due:
            self._arm_read_timer(limits.body_timeout)  # it is we who keep the client waiting
        elif parser.phase is Phase.IDLE:
            self._close(limits.linger_timeout)
        elif parser.phase is Phase.HEAD:
            self._refuse(ApiError(408, "the request's headers did not arrive in time"))
        else:
            allowed = limits.body_timeout + parser.body_bytes / limits.min_body_rate
            left = self._body_started + allowed - self._loop.time()
            if left > 0:
                self._arm_read_timer(left)
            else:
                self._refuse(ApiError(408, "the request's body did not arrive in time"))

    def _refuse(self, error: ApiError) -> None:
        """Answer ``error`` after the requests already waiting, then close."""
        self._discarding = True
        self._cancel_read_timer()
        self._waiting.append(error)
        self._next()

    # -- answering ---------------------------------------------------------------------------

    def _next(self) -> None:
        """Take the next waiting request, if the previous one is completely answered."""
        if self._request is not None or self.write_paused or self._closing or self._lost:
            return
        if self._waiting:
            item = self._waiting.popleft()
            if isinstance(item, ApiError):
                self._respond_error(item)
                return
            self._request = item
            self._taken_at = perf_counter()
            self._server.exchange_started()
            if self._parser.phase is Phase.IDLE:
                self._cancel_read_timer()
            self._task = self._loop.create_task(self._run(item))
        if not self._waiting:
            if self._read_paused:
                self._read_paused = False
                self._transport.resume_reading()
            self._continue_if_due()

    async def _run(self, request: Request) -> None:
        try:
            response = await self._server.app(request)
        except asyncio.CancelledError:
            if not self._lost:  # cancelled by someone else: there is nothing to answer with
                self._transport.abort()
            raise
        except Exception:
            logger.exception("handler for %s %s failed", request.method, request.path)
            response = internal_error().response()
        self._task = None
        self._respond(request, response)

    def _respond(self, request: Request, response: Response | StreamingResponse) -> None:
        if self._lost:
            if isinstance(response, StreamingResponse):
                response.source.abandon()
            return
        self._status = response.status
        streaming = isinstance(response, StreamingResponse)
        keep_alive = self._keep_alive(request) and (request.http_1_1 or not streaming)
        head = self._server.head.build(
            response, request.id, keep_alive=keep_alive, http_1_1=request.http_1_1
        )
        if isinstance(response, StreamingResponse):
            self._transport.write(head)
            self._source = response.source
            response.source.attach(ChunkedWriter(self, self._transport, request.http_1_1))
        else:
            self._transport.write(head if request.method == "HEAD" else head + response.body)
            self._end_exchange(keep_alive)

    def _respond_error(self, error: ApiError) -> None:
        response = error.response()
        head = self._server.head.build(
            response, make_request_id(None), keep_alive=False, http_1_1=True
        )
        self._transport.write(head + response.body)
        logger.info("refused a request: %d %s", error.status, error)
        self._close(self._limits.reject_linger_timeout)

    def body_finished(self, *, keep_alive: bool) -> None:
        """Called by the writer when the streaming body is complete."""
        request, self._source = self._request, None
        if request is not None:
            self._end_exchange(keep_alive and self._keep_alive(request))

    def _keep_alive(self, request: Request) -> bool:
        return request.keep_alive and not self._server.draining

    def _end_exchange(self, keep_alive: bool) -> None:
        self._log_exchange(disconnected=False)
        self._request = None
        self._server.exchange_ended()
        if not keep_alive:
            self._close(self._limits.linger_timeout)
            return
        self._next()
        if self._request is None and not self._closing and self._parser.phase is Phase.IDLE:
            self._arm_read_timer(self._limits.keep_alive_timeout)

    def _log_exchange(self, *, disconnected: bool) -> None:
        request = self._request
        if request is not None and logger.isEnabledFor(logging.INFO):
            what = "client disconnected" if disconnected else str(self._status)
            elapsed = (perf_counter() - self._taken_at) * 1e3
            logger.info(
                "%s %s %s %.1f ms %s", request.method, request.path, what, elapsed, request.id
            )

    # -- closing -----------------------------------------------------------------------------

    def shut_down(self) -> None:
        """The server is going down: close once what is buffered has been sent, or at once, with
        the handler cancelled, when a request is still being answered."""
        if self._request is not None:
            self._transport.abort()
        elif not self._lost:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection now."""
        if not self._lost:
            self._transport.abort()

    def _close(self, linger: float) -> None:
        """Send the rest, shut down our side, and discard input until the client closes too."""
        if self._closing or self._lost:
            return
        self._closing = self._discarding = True
        self._waiting.clear()
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()
        self._arm_read_timer(linger)
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # -- timers ------------------------------------------------------------------------------

    def _arm_read_timer(self, seconds: float) -> None:
        self._cancel_read_timer()
        self._read_timer = self._loop.call_later(seconds, self._read_timed_out)

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
