"""The HTTP protocol, bytes in and bytes out: a recording transport instead of sockets."""

import asyncio
import errno
import re
import selectors
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.server.errors import ApiError
from squall.server.http import HttpProtocol
from squall.server.listener import BindError, HttpServer, bind, is_loopback
from squall.server.messages import Limits, Response, StreamingResponse

GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /y?a=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nX-Request-Id: id-1\r\n\r\nhello"
CHUNKED = (
    b"POST /y HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
)


class RecordingTransport(asyncio.Transport):
    """Keeps what is written; ``drop`` is what the network does to a connection."""

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.sent = bytearray()
        self.reading = True
        self.eof = self.closed = self.aborted = False

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def write(self, data):
        assert data, "an empty write"
        assert not self.eof, "written after the end"
        self.sent += data

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.eof = True

    def pause_reading(self):
        assert self.reading
        self.reading = False

    def resume_reading(self):
        assert not self.reading
        self.reading = True

    def close(self):
        self.drop()

    def abort(self):
        self.aborted = True
        self.drop()

    def drop(self):
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class _JumpingSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout=None):
        events = super().select(0)
        if not events and timeout:
            self.now += timeout
        return events


def run_timed(coroutine):
    """``asyncio.run`` with a clock that jumps to the next timer: exact on a busy machine."""
    selector = _JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(coroutine)


class App:
    """Records requests; answers with ``METHOD path body`` unless told otherwise."""

    def __init__(self, answer=None):
        self.requests = []
        self.answer = answer
        self.running = self.most_running = self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, request):
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.gate.wait()
            if isinstance(self.answer, Exception):
                raise self.answer
            if self.answer is not None:
                return self.answer
            body = f"{request.method} {request.path} ".encode() + request.body
            return Response(body=body, content_type=b"text/plain")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def connect(app, **limits):
    server = HttpServer(app, Limits(**limits))
    protocol = HttpProtocol(server, asyncio.get_running_loop())
    transport = RecordingTransport(protocol)
    protocol.connection_made(transport)
    return protocol, transport, server


async def settle(turns=12):
    for _ in range(turns):
        await asyncio.sleep(0)


def split_responses(data):
    """[(status, headers, body)] of a byte stream of Content-Length responses."""
    out = []
    data = bytes(data)
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", lines[0])[1])
        headers = dict(line.split(": ", 1) for line in lines[1:])
        size = int(headers.get("content-length", 0))
        out.append((status, headers, data[:size]))
        data = data[size:]
    return out


def exchange(chunks, app=None, **limits):
    """Feed ``chunks`` one by one; returns (responses, transport, app)."""

    async def main():
        handler = app or App()
        protocol, transport, _ = connect(handler, **limits)
        for chunk in chunks:
            protocol.data_received(chunk)
            await settle(3)
        await settle()
        transport.closed_by_server = transport.closed
        result = split_responses(transport.sent), transport, handler
        transport.drop()
        await settle()
        return result

    return asyncio.run(main())


def test_a_request_is_parsed_and_answered():
    responses, transport, app = exchange([POST])
    (request,) = app.requests
    assert (request.method, request.path, request.query) == ("POST", "/y", "a=1")
    assert (request.host, request.body, request.id) == ("h", b"hello", "id-1")
    ((status, headers, body),) = responses
    assert (status, body) == (200, b"POST /y hello")
    assert headers["x-request-id"] == "id-1"
    assert headers["content-type"] == "text/plain"
    assert "date" in headers
    assert "connection" not in headers
    assert not transport.eof


@pytest.mark.parametrize("message", [GET, POST, CHUNKED], ids=["get", "length", "chunked"])
def test_split_at_every_byte(message):
    expected = exchange([message])[0][0]
    for cut in range(1, len(message)):
        ((status, _, body),) = exchange([message[:cut], message[cut:]])[0]
        assert (status, body) == (expected[0], expected[2])
    ((status, _, body),) = exchange([bytes([byte]) for byte in message])[0]
    assert (status, body) == (expected[0], expected[2])


def test_chunked_body_extensions_and_trailers():
    responses, _, app = exchange([CHUNKED + GET])
    assert [body for *_, body in responses] == [b"POST /y hello", b"GET /x "]
    assert "trailer" not in app.requests[0].headers


def test_pipelined_requests_are_answered_one_at_a_time_in_order():
    async def main():
        app = App()
        app.gate.clear()
        protocol, transport, _ = connect(app)
        protocol.data_received(GET + POST + CHUNKED)
        await settle()
        assert (len(app.requests), app.most_running) == (1, 1)
        assert not transport.reading, "more than one request waits: reading must pause"
        app.gate.set()
        await settle(30)
        bodies = [body for *_, body in split_responses(transport.sent)]
        assert bodies == [b"GET /x ", b"POST /y hello", b"POST /y hello"]
        assert app.most_running == 1
        assert transport.reading

    asyncio.run(main())


def test_too_many_pipelined_requests():
    responses, transport, _ = exchange([GET * 9], max_pipelined=5)
    assert [status for status, *_ in responses] == [200] * 5 + [400]
    assert transport.eof


def test_keep_alive_then_close():
    close = b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    responses, transport, _ = exchange([GET, GET, close + GET])
    assert [status for status, *_ in responses] == [200, 200, 200]
    assert responses[2][1]["connection"] == "close"
    assert transport.eof


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /x\r\n\r\n", 505),  # HTTP/0.9
        (b"GET /x HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n\x00: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nA: b\x00c\r\n\r\n", 400),
        (b"GET /x HTTP/9.9\r\nHost: a\r\n\r\n", 400),
        (b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"BREW /x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT h:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
        (b"GET x-y-z HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS on the plain port
    ],
)
def test_malformed_requests_are_refused_and_the_connection_ends(message, status):
    responses, transport, app = exchange([message, GET])
    ((got, headers, body),) = responses
    assert got == status, body
    assert headers["connection"] == "close"
    assert b'"error"' in body
    assert transport.eof, "the sending side is shut down"
    assert not transport.aborted, "but nothing is reset"
    assert not app.requests, "what follows a refused request is not taken for one"


def test_a_good_request_before_a_bad_one_is_still_answered():
    responses, transport, _ = exchange([GET + b"BREW / HTTP/1.1\r\n\r\n" + GET])
    assert [status for status, *_ in responses] == [200, 400]
    assert transport.eof


def test_body_limit_by_content_length_is_refused_without_reading():
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\n"
    responses, transport, app = exchange([head, b"x" * 65536, b"x" * 65536], max_body_bytes=1000)
    assert [status for status, *_ in responses] == [413]
    assert transport.eof
    assert not transport.closed_by_server, "input is discarded for a while, or a reset is sent"
    assert not app.requests


def test_body_limit_of_a_chunked_body():
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    responses, transport, app = exchange([head] + [b"190\r\n" + b"x" * 400 + b"\r\n"] * 5,
                                         max_body_bytes=1000)  # fmt: skip
    assert [status for status, *_ in responses] == [413]
    assert transport.eof
    assert not app.requests


def test_a_body_of_exactly_the_limit_passes():
    message = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
    assert exchange([message], max_body_bytes=1000)[0][0][0] == 200
    assert exchange([message], max_body_bytes=999)[0][0][0] == 413


def test_header_limits():
    start = b"GET /x HTTP/1.1\r\nHost: h\r\n"
    many = start + b"".join(b"A%d: 1\r\n" % i for i in range(50)) + b"\r\n"
    assert exchange([many], max_header_count=60)[0][0][0] == 200
    assert exchange([many], max_header_count=50)[0][0][0] == 431
    big = start + b"A: " + b"x" * 500 + b"\r\n\r\n"
    assert exchange([big], max_header_bytes=600)[0][0][0] == 200
    assert exchange([big], max_header_bytes=500)[0][0][0] == 431
    target = b"GET /" + b"x" * 600 + b" HTTP/1.1\r\nHost: h\r\n\r\n"
    assert exchange([target], max_header_bytes=500)[0][0][0] == 414
    endless = [start, b"A: "] + [b"x" * 50] * 40
    assert exchange(endless, max_header_bytes=500)[0][0][0] == 431


def test_expect_continue():
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    _, transport, _ = exchange([head])
    assert transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    responses, _, app = exchange([head, b"hello"])
    assert app.requests[0].body == b"hello"
    assert [status for status, *_ in responses] == [100, 200]
    assert [s for s, *_ in exchange([head + b"hello"])[0]][-1] == 200
    assert [s for s, *_ in exchange([head], max_body_bytes=4)[0]] == [413]


def test_expect_continue_waits_for_its_turn():
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"

    async def main():
        app = App()
        app.gate.clear()
        protocol, transport, _ = connect(app)
        protocol.data_received(GET + head)
        await settle()
        assert transport.sent == b""
        app.gate.set()
        await settle()
        assert [s for s, *_ in split_responses(transport.sent)] == [200, 100]
        protocol.data_received(b"hello")
        await settle()
        assert [s for s, *_ in split_responses(transport.sent)] == [200, 100, 200]

    asyncio.run(main())


def test_http_1_0():
    responses, transport, _ = exchange([b"GET /x HTTP/1.0\r\n\r\n"])
    assert (responses[0][0], responses[0][1]["connection"]) == (200, "close")
    assert transport.eof
    responses, transport, _ = exchange([b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"])
    assert (responses[0][0], responses[0][1]["connection"]) == (200, "keep-alive")
    assert not transport.eof


@pytest.mark.parametrize("cut", [0, 20, 80, 120])
def test_an_offered_upgrade_is_declined(cut):
    message = POST.replace(
        b"X-Request-Id: id-1",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
    )
    data = message + GET
    chunks = [data[:cut], data[cut:]] if cut else [data]
    responses, _, app = exchange(chunks)
    assert [body for *_, body in responses] == [b"POST /y hello", b"GET /x "]
    assert app.requests[0].headers["http2-settings"] == "AAMAAABk"
    message = b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert [body for *_, body in exchange([message + GET])[0]] == [b"GET /ws ", b"GET /x "]


def test_absolute_form_names_the_host():
    _, _, app = exchange([b"GET http://evil:80/v1/x?q HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    assert (app.requests[0].path, app.requests[0].query) == ("/v1/x", "q")
    assert app.requests[0].host == "evil"


def test_head_has_length_but_no_body():
    _, transport, _ = exchange([b"HEAD /x HTTP/1.1\r\nHost: h\r\n\r\n"])
    assert transport.sent.endswith(b"\r\n\r\n")
    assert b"content-length: 8\r\n" in transport.sent


def test_request_ids_are_echoed_only_when_they_are_safe():
    for offered, echoed in ((b"a-b_c.1", True), (b"x" * 128, True), (b"x" * 129, False),
                            (b"a b", False), (b"\xe4", False)):  # fmt: skip
        message = b"GET /x HTTP/1.1\r\nHost: h\r\nX-Request-Id: %b\r\n\r\n" % offered
        got = exchange([message])[0][0][1]["x-request-id"]
        assert (got.encode("latin-1") == offered) is echoed
        assert re.fullmatch(r"[!-~]{1,128}", got)


def test_a_failing_handler_is_a_500_and_the_connection_goes_on():
    async def main():
        app = App(answer=RuntimeError("secret"))
        protocol, transport, _ = connect(app)
        protocol.data_received(GET)
        await settle()
        app.answer = None
        protocol.data_received(GET)
        await settle()
        responses = split_responses(transport.sent)
        assert [status for status, *_ in responses] == [500, 200]
        assert b"secret" not in responses[0][2]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["lost", "eof"])
def test_a_disconnect_cancels_the_handler_at_once(how):
    async def main():
        app = App()
        app.gate.clear()
        protocol, transport, server = connect(app)
        protocol.data_received(GET)
        await settle()
        assert server.active == 1
        if how == "eof":
            protocol.eof_received()
        else:
            transport.drop()
        await settle(4)
        assert app.cancelled == 1
        assert server.active == 0
        assert transport.closed
        assert transport.sent == b""

    asyncio.run(main())


class Source:
    """A body that is pushed by the test."""

    def __init__(self):
        self.writer = None
        self.resumed = self.abandoned = 0

    def attach(self, writer):
        self.writer = writer

    def resume(self):
        self.resumed += 1

    def abandon(self):
        self.abandoned += 1


def streaming(run, message=GET, runner=asyncio.run, **limits):
    async def main():
        source = Source()
        app = App(answer=StreamingResponse(source))
        protocol, transport, server = connect(app, **limits)
        protocol.data_received(message)
        await settle()
        await run(source, protocol, transport, server, app)
        transport.drop()
        await settle()

    runner(main())


def test_streaming_is_chunked_and_the_connection_goes_on():
    async def run(source, protocol, transport, server, app):
        head, _, rest = bytes(transport.sent).partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert b"content-type: text/event-stream" in head
        assert rest == b""
        source.writer.write(b"data: 1\n\n")
        source.writer.write(b"x" * 20)
        assert transport.sent.endswith(b"9\r\ndata: 1\n\n\r\n14\r\n" + b"x" * 20 + b"\r\n")
        assert server.active == 1
        source.writer.finish()
        assert transport.sent.endswith(b"\r\n0\r\n\r\n")
        assert server.active == 0
        app.answer = None
        protocol.data_received(GET)
        await settle()
        assert transport.sent.endswith(b"\r\n\r\nGET /x ")
        assert not transport.eof
        assert source.abandoned == 0

    streaming(run)


def test_streaming_can_end_the_connection():
    async def run(source, protocol, transport, server, app):
        source.writer.write(b"error")
        source.writer.finish(keep_alive=False)
        assert transport.eof

    streaming(run)


def test_streaming_to_http_1_0_ends_with_the_connection():
    async def run(source, protocol, transport, server, app):
        source.writer.write(b"abc")
        source.writer.finish()
        head, _, body = bytes(transport.sent).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"connection: close" in head
        assert body == b"abc"
        assert transport.eof

    streaming(run, b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")


def test_streaming_is_paused_resumed_and_abandoned():
    async def run(source, protocol, transport, server, app):
        assert not source.writer.paused
        protocol.pause_writing()
        assert source.writer.paused
        protocol.resume_writing()
        assert (source.writer.paused, source.resumed) == (False, 1)
        transport.drop()
        await settle(3)
        assert source.abandoned == 1
        assert server.active == 0

    streaming(run)


def test_a_reader_that_stops_reading_is_dropped():
    async def run(source, protocol, transport, server, app):
        protocol.pause_writing()
        await asyncio.sleep(0.06)
        assert transport.aborted
        assert source.abandoned == 1

    streaming(run, runner=run_timed, write_timeout=0.02)


def test_the_next_request_waits_until_the_response_has_been_taken():
    async def main():
        app = App()
        protocol, transport, _ = connect(app)
        protocol.pause_writing()
        protocol.data_received(GET)
        await settle()
        assert not app.requests
        protocol.resume_writing()
        await settle()
        assert len(app.requests) == 1
        transport.drop()
        await settle()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "limits", "status"),
    [
        (b"", {"header_timeout": 0.02}, None),
        (b"GET /x HT", {"header_timeout": 0.02}, 408),
        (POST[:-1], {"body_timeout": 0.02}, 408),
        (GET, {"keep_alive_timeout": 0.02}, 200),
    ],
)
def test_slow_clients(sent, limits, status):
    async def main():
        protocol, transport, _ = connect(App(), linger_timeout=0.02,
                                         reject_linger_timeout=0.02, **limits)  # fmt: skip
        if sent:
            protocol.data_received(sent)
        await asyncio.sleep(0.015)
        assert not transport.eof
        await asyncio.sleep(0.025)
        assert transport.eof
        assert [s for s, *_ in split_responses(transport.sent)] == ([status] if status else [])
        await asyncio.sleep(0.05)
        assert transport.closed, "lingering ends"

    run_timed(main())


def test_a_slow_but_steady_body_gets_the_time_its_rate_earns():
    async def main():
        app = App()
        protocol, transport, _ = connect(app, body_timeout=0.02, min_body_rate=1000)
        protocol.data_received(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 200\r\n\r\n")
        for _ in range(10):
            protocol.data_received(b"x" * 20)  # earns 20 ms
            await asyncio.sleep(0.008)
        await settle()
        assert len(app.requests) == 1
        transport.drop()
        await settle()

    run_timed(main())


def test_too_many_connections():
    async def main():
        server = HttpServer(App(), Limits(max_connections=1))
        transports = []
        for _ in range(2):
            protocol = HttpProtocol(server, asyncio.get_running_loop())
            transports.append(RecordingTransport(protocol))
            protocol.connection_made(transports[-1])
        assert transports[0].sent == b""
        ((status, headers, _),) = split_responses(transports[1].sent)
        assert (status, headers["retry-after"]) == (503, "1")
        assert transports[1].eof
        for transport in transports:
            transport.drop()
        await settle()

    asyncio.run(main())


def test_draining_closes_after_the_response():
    async def main():
        app = App()
        app.gate.clear()
        protocol, transport, server = connect(app)
        protocol.data_received(GET)
        await settle()
        drained = asyncio.create_task(server.drain(5))
        await settle()
        assert not drained.done()
        app.gate.set()
        assert await drained is True
        ((status, headers, _),) = split_responses(transport.sent)
        assert (status, headers["connection"]) == (200, "close")
        assert transport.eof
        await server.close()
        assert transport.closed

    asyncio.run(main())


def test_close_cuts_what_does_not_finish():
    async def main():
        app = App()
        app.gate.clear()
        protocol, transport, server = connect(app)
        protocol.data_received(GET)
        await settle()
        assert await server.drain(0.01) is False
        await server.close()
        assert transport.aborted
        assert app.cancelled == 1

    asyncio.run(main())


def test_close_cuts_a_client_that_does_not_take_its_response():
    async def main():
        protocol, transport, server = connect(App())
        protocol.data_received(GET)
        await settle()
        transport.close = lambda: None  # never flushed
        await server.close(timeout=0.01)
        assert transport.aborted

    asyncio.run(main())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_make_the_protocol_fail(data):
    """Mutated requests in random pieces: answered or refused, and never a second response
    after a refusal."""
    stream = bytearray(b"".join(data.draw(st.lists(st.sampled_from([GET, POST, CHUNKED]),
                                                   min_size=1, max_size=4))))  # fmt: skip
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        if data.draw(st.booleans()):
            stream[at] = data.draw(st.integers(0, 255))
        else:
            del stream[at : at + data.draw(st.integers(1, 9))]
        if not stream:
            return
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [bytes(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    responses, transport, _ = exchange([piece for piece in pieces if piece])
    statuses = [status for status, *_ in responses]
    refused = [i for i, (_, headers, _) in enumerate(responses)
               if headers.get("connection") == "close"]  # fmt: skip
    assert refused in ([], [len(statuses) - 1])
    assert set(statuses) <= {100, 200, 400, 413, 414, 417, 431, 501, 505}
    assert bool(refused) == transport.eof


def test_bind_reports_a_taken_port_in_one_line():
    (first,) = bind("127.0.0.1", 0)
    with first:
        port = first.getsockname()[1]
        with pytest.raises(BindError) as caught:
            bind("127.0.0.1", port)
    assert str(port) in str(caught.value)
    assert "--port" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bind_errors_are_one_line():
    for host, port in (("no-such-host.invalid", 0), ("192.0.2.1", 0), ("a" * 300, 0)):
        with pytest.raises(BindError) as caught:
            bind(host, port)
        assert "\n" not in str(caught.value)


def test_bind_localhost_uses_one_port_for_every_address():
    try:
        sockets = bind("localhost", 0)
    except BindError as error:  # a machine without IPv6 may still resolve localhost to it
        pytest.skip(f"{errno.errorcode[errno.EADDRNOTAVAIL]}: {error}")
    ports = {sock.getsockname()[1] for sock in sockets}
    assert len(ports) == 1
    assert {sock.family for sock in sockets} <= {socket.AF_INET, socket.AF_INET6}
    for sock in sockets:
        sock.close()


def test_is_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "evil.example", "localhost.evil", ""]))


def test_an_api_error_has_the_openai_body():
    error = ApiError(404, "no", param="model", code="model_not_found")
    assert error.response().body == (
        b'{"error":{"message":"no","type":"invalid_request_error",'
        b'"param":"model","code":"model_not_found"}}'
    )
