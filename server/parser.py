"""Bytes to requests: llhttp's callbacks (through httptools) plus the limits it does not enforce."""

import re
import uuid
from enum import Enum

import httptools

from squall.server.errors import ApiError
from squall.server.messages import Limits, Request

_SAFE_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Phase(Enum):
    """What the reading side of a connection is in the middle of."""

    IDLE = 0
    HEAD = 1
    BODY = 2


def make_request_id(offered: str | None) -> str:
    """``offered`` when it is safe to echo in a header, else a new id."""
    if offered is not None and _SAFE_REQUEST_ID.fullmatch(offered):
        return offered
    return f"req-{uuid.uuid4().hex}"


class RequestParser:
    """Collects requests one after the other; one per connection.

    ``feed`` and the ``on_*`` callbacks raise ``ApiError`` when a request must be refused; nothing
    may be fed after that.
    """

    def __init__(self, limits: Limits) -> None:
        # connection
        self.limits = limits
        self.finished: list[Request] = []  # complete, not yet taken by the connection
        self.ended = False  # the last request asked for the connection to be closed
        self._llhttp = httptools.HttpRequestParser(self)
        # request
        self.serial = 0  # which request of the connection this is
        self.phase = Phase.IDLE
        self.body_bytes = 0
        self.continue_due = False  # the client waits for "100 Continue" before it sends the body
        self._head_bytes = 0
        self._pending_head_bytes = 0
        self._header_count = 0
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._http_1_1 = True
        self._keep_alive = True

    def feed(self, data: bytes) -> None:
        """Parse ``data``; whole requests are appended to ``finished``. Raises ApiError."""
        in_head = self.phase is Phase.HEAD
        size = len(data)
        try:
            while data and not self.ended:
                try:
                    self._llhttp.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    self._decline_upgrade()
        except httptools.HttpParserCallbackError as failure:
            if isinstance(failure.__context__, ApiError):
                raise failure.__context__ from None
            raise
        except httptools.HttpParserError as failure:
            if not self.ended:  # llhttp also refuses whatever follows "Connection: close"
                raise ApiError(400, f"malformed HTTP request: {failure}") from None
        if in_head and self.phase is Phase.HEAD:  # one header may come in many small pieces
            self._pending_head_bytes += size
            self._check_head_size(self._pending_head_bytes)

    def _decline_upgrade(self) -> None:
        """Go on with HTTP/1.1, as RFC 9110 §7.8 allows (Java's client offers h2c every time).

        llhttp takes what follows an upgrade's head for another protocol, a body included, so a
        new parser is given the same head without the offer.
        """
        method, headers = self._llhttp.get_method(), self._headers
        tokens = {token.strip().lower() for token in headers.pop("connection", "").split(",")}
        headers.pop("upgrade", None)
        if "close" in tokens:
            headers["connection"] = "close"
        head = [b"%b %b HTTP/1.1\r\n" % (method, self._url)]
        head += [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
        self._llhttp = httptools.HttpRequestParser(self)
        self._llhttp.feed_data(b"".join(head) + b"\r\n")

    def _check_head_size(self, size: int) -> None:
        limit = self.limits.max_header_bytes
        if size > limit:
            raise ApiError(431, f"the request's headers are over the limit of {limit} bytes")

    def _check_body_size(self, size: int) -> None:
        limit = self.limits.max_body_bytes
        if size > limit:
            self._body.clear()
            raise ApiError(413, f"the request's body is over the limit of {limit} bytes")

    def on_message_begin(self) -> None:
        self.serial += 1
        self.phase = Phase.HEAD
        self.body_bytes = self._head_bytes = self._pending_head_bytes = self._header_count = 0
        self._url = b""
        self._headers = {}
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._head_bytes += len(url)
        limit = self.limits.max_header_bytes
        if self._head_bytes > limit:
            raise ApiError(414, f"the request's target is over the limit of {limit} bytes")

    def on_header(self, name: bytes, value: bytes | None) -> None:
        value = value or b""
        self._header_count += 1
        self._head_bytes += len(name) + len(value) + 4
        self._check_head_size(self._head_bytes)
        if self._header_count > self.limits.max_header_count:
            raise ApiError(431, f"more than {self.limits.max_header_count} headers")
        if self.phase is Phase.BODY:
            return  # a trailer: counted, and dropped as RFC 9110 §6.5.1 allows
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip()
        if key in self._headers:
            if key == "host":
                raise ApiError(400, "more than one Host header")
            text = f"{self._headers[key]}, {text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        self.phase = Phase.BODY
        headers = self._headers
        version = self._llhttp.get_http_version()
        if version not in ("1.1", "1.0"):
            raise ApiError(505, f"HTTP/{version} is not spoken here; HTTP/1.1 and HTTP/1.0 are")
        self._http_1_1 = version == "1.1"
        self._keep_alive = self._llhttp.should_keep_alive()
        if self._http_1_1 and "host" not in headers:
            raise ApiError(400, "an HTTP/1.1 request needs a Host header")
        if self._llhttp.get_method() == b"CONNECT":
            raise ApiError(501, "the method CONNECT is not supported")
        coding = headers.get("transfer-encoding")
        if coding is not None and (not self._http_1_1 or coding.lower() != "chunked"):
            raise ApiError(501, f"transfer-encoding {coding!r} is not supported; 'chunked' is")
        self._check_body_size(int(headers.get("content-length", "0")))
        expect = headers.get("expect")
        if expect is not None:
            if expect.lower() != "100-continue":
                raise ApiError(417, f"the expectation {expect!r} cannot be met")
            self.continue_due = self._http_1_1

    def on_body(self, data: bytes) -> None:
        self.continue_due = False
        self.body_bytes += len(data)
        self._check_body_size(self.body_bytes)
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._llhttp.should_upgrade():
            return  # comes again, see _decline_upgrade
        self.phase = Phase.IDLE
        self.continue_due = False
        path, query, host = self._target()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        if len(self.finished) == self.limits.max_pipelined:
            raise ApiError(400, f"more than {self.limits.max_pipelined} requests sent ahead")
        self.ended = not self._keep_alive
        self.finished.append(
            Request(
                method=self._llhttp.get_method().decode("ascii"),
                path=path,
                query=query,
                host=host,
                headers=self._headers,
                body=body,
                id=make_request_id(self._headers.get("x-request-id")),
                http_1_1=self._http_1_1,
                keep_alive=self._keep_alive,
            )
        )

    def _target(self) -> tuple[str, str, str]:
        """Path, query and authority of the request's target (RFC 9112 §3.2)."""
        url = self._url
        if url.startswith(b"/") or url == b"*":
            path, _, query = url.partition(b"?")
            return path.decode("latin-1"), query.decode("latin-1"), self._headers.get("host", "")
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            raise ApiError(400, "malformed request target") from None
        host = (parsed.host or b"").decode("latin-1")
        return (
            (parsed.path or b"/").decode("latin-1"),
            (parsed.query or b"").decode("latin-1"),
            f"[{host}]" if ":" in host else host,
        )
