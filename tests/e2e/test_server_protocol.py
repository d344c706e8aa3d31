"""The server on real sockets, with a fake model: the openai client, curl, raw bytes, signals."""

import asyncio
import contextlib
import http.client
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import uvloop

from squall.server.app import ready_line
from squall.server.listener import HttpServer, bind
from squall.server.messages import Limits
from squall.server.openai import routes
from squall.server.router import Router
from squall.server.state import ServerState

FAKE = Path(__file__).parents[1] / "fake_backend.py"
_spec = importlib.util.spec_from_file_location("fake_backend", FAKE)
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

HELLO = [{"role": "user", "content": "hi"}]


class LiveServer:
    """A server in a thread of this process."""

    def __init__(self, **backend):
        self.ready = threading.Event()
        self.backend = fake.FakeBackend(**backend)
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        (listener,) = bind("127.0.0.1", 0)
        self.address = listener.getsockname()
        self.state = ServerState()
        self.state.backend = self.backend
        server = HttpServer(Router(routes(self.state), loopback_only=True), Limits())
        await server.start([listener])
        self.ready.set()
        await self.stop.wait()
        await server.close()
        self.state.close()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.address[1]}"

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, **options)

    def connect(self):
        return socket.create_connection(self.address, timeout=10)

    def wait_for(self, condition, seconds=5.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def live():
    with LiveServer(step=0.002) as server:
        yield server


def http_post(address, path, body, headers=()):
    """(status, headers, body) through http.client."""
    connection = http.client.HTTPConnection(*address[:2], timeout=20)
    with contextlib.closing(connection):
        sent = {"Content-Type": "application/json", **dict(headers)}
        connection.request("POST", path, json.dumps(body), sent)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def raw_request(body, path="/v1/completions"):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_until(sock, marker):
    """Everything up to the piece in which ``marker`` ends, or to the end."""
    data = bytearray()
    while data.find(marker, max(0, len(data) - 65536 - len(marker))) < 0:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return bytes(data)


# -- the openai client -----------------------------------------------------------------------


def test_chat(live):
    with live.client() as client:
        answer = client.chat.completions.create(model="org/fake", messages=HELLO)
        assert answer.choices[0].message.content == fake.TEXT
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_stream(live):
    with live.client() as client:
        stream = client.chat.completions.create(
            model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert [c.choices[0].delta.role for c in chunks if c.choices].count("assistant") == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == fake.TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8


def test_chat_stream_helper_accumulates(live):
    with live.client() as client, client.chat.completions.stream(
        model="default", messages=HELLO, n=2, logprobs=True, top_logprobs=1
    ) as stream:  # fmt: skip
        final = stream.get_final_completion()
    for choice in final.choices:
        assert choice.message.content == fake.TEXT
        assert choice.message.role == "assistant"
        assert "".join(entry.token for entry in choice.logprobs.content) == fake.TEXT


def test_completions_logprobs_n_and_stop(live):
    with live.client() as client:
        answer = client.completions.create(
            model="default", prompt=["a", "b"], n=2, logprobs=1, stop=["done"], echo=False
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert {choice.text for choice in answer.choices} == {fake.TEXT.removesuffix("done.")}
        assert answer.choices[3].logprobs.tokens[0] == "Hello"
        chat = client.chat.completions.create(
            model="default", messages=HELLO, n=2, logprobs=True, top_logprobs=2, max_tokens=2
        )
        assert [choice.finish_reason for choice in chat.choices] == ["length"] * 2
        assert chat.choices[1].logprobs.content[1].top_logprobs[1].logprob == -1.5


def test_eight_clients_at_once(live):
    def ask(number):
        with live.client() as client:
            if number % 2:
                stream = client.chat.completions.create(
                    model="default", messages=HELLO, stream=True
                )
                return "".join(c.choices[0].delta.content or "" for c in stream)
            answer = client.chat.completions.create(model="default", messages=HELLO)
            return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [fake.TEXT] * 8


def test_errors_become_the_clients_exceptions(live):
    with live.client() as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            client.chat.completions.create(model="gpt-x", messages=HELLO)
        assert not_found.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="default", messages=HELLO, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(
                model="default", messages=HELLO, extra_body={"frobnicate": 1}
            )
        assert bad.value.param == "frobnicate"
        with pytest.raises(openai.APIError, match="NaN"):
            list(client.completions.create(model="default", prompt="FAIL", stream=True))
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="default", prompt="FAIL")


def test_models_and_request_id(live):
    with live.client() as client:
        assert [model.id for model in client.models.list()] == ["org/fake"]
        assert client.models.retrieve("org/fake").id == "org/fake"
        raw = client.chat.completions.with_raw_response.create(
            model="default", messages=HELLO, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.headers["x-request-id"] == "mine-1"
        assert raw.parse()._request_id == "mine-1"


def test_the_client_retries_a_full_queue():
    with LiveServer(step=0.01, max_running=1) as server:
        blocker = server.client().completions.create(model="default", prompt="FOREVER", stream=True)
        next(iter(blocker))
        with server.client() as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="default", prompt="x")
        assert caught.value.response.headers["retry-after"] == "1"
        threading.Timer(0.3, blocker.close).start()
        with server.client().with_options(max_retries=4) as patient:
            answer = patient.completions.create(model="default", prompt="x")
        assert answer.choices[0].text == fake.TEXT


# -- disconnects and slow readers ------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels_within_100_ms(live, stream):
    latencies = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        before = len(live.backend.cancelled)
        with live.connect() as sock:
            sock.sendall(raw_request({"prompt": "FOREVER", "n": 2, "stream": stream}))
            live.wait_for(lambda: live.backend.running)
            if stream:
                read_until(sock, b"Hello")
            closed = time.perf_counter()
        live.wait_for(lambda count=before: len(live.backend.cancelled) > count)
        latencies.append(live.backend.cancelled[-1][1] - closed)
        assert not live.backend.running
    assert min(latencies) < 0.1, latencies
    assert not live.state.running


def test_a_slow_reader_blocks_nobody_and_gets_everything(live):
    words = 200_000
    with socket.socket() as sock:
        sock.settimeout(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        sock.connect(live.address)
        body = {"prompt": "FLOOD", "max_tokens": words, "stream": True}
        sock.sendall(raw_request(body))
        live.wait_for(lambda: live.backend.running)
        live.wait_for(lambda: not live.backend.running)  # all produced, hardly any of it read
        with live.client() as client:
            answer = client.completions.create(model="default", prompt="x")
            assert answer.choices[0].text == fake.TEXT
        data = read_until(sock, b"data: [DONE]\n\n")
    response = http.client.HTTPResponse(FakeSocket(data + b"\r\n0\r\n\r\n"))
    response.begin()
    events = response.read().decode().split("\n\n")
    texts = [
        json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]
    ]
    assert "".join(texts) == "0123456789" * 4 * words
    assert len(texts) < 200, "what the reader was behind with came merged"


class FakeSocket:
    """What http.client needs to parse bytes."""

    def __init__(self, data):
        self.data = data

    def makefile(self, mode):
        return io.BytesIO(self.data)


# -- bodies and bytes ------------------------------------------------------------------------


def test_a_100_mb_body_gets_its_413(live):
    connection = http.client.HTTPConnection(*live.address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", b"x" * 100_000_000)
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"

    def pieces():
        for _ in range(100):
            yield b"x" * 1_000_000

    connection = http.client.HTTPConnection(*live.address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", pieces(), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
    with live.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="default", prompt="x" * 40_000_000)
    assert caught.value.status_code == 413


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_sees_413_and_can_post(live, tmp_path):
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(100_000_000)
    url = live.url + "/v1/completions"
    for more in ([], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]):
        out = subprocess.run(
            ["curl", "-sS", "-w", "%{http_code}", "-o", str(tmp_path / "answer"),
             "--data-binary", f"@{big}", *more, url],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert out.stdout == "413", (more, out)
    body = json.dumps({"prompt": "hi" * 2000, "max_tokens": 1})
    out = subprocess.run(
        ["curl", "-sS", "-d", body, "-H", "Expect: 100-continue", url],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert json.loads(out.stdout)["choices"][0]["text"] == "Hello"


def test_pipelined_requests_over_one_connection(live):
    with live.connect() as sock:
        first = raw_request({"prompt": "a", "echo": True, "max_tokens": 1})
        second = raw_request({"prompt": "b", "echo": True, "max_tokens": 1, "stream": True})
        sock.sendall(first + second + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = read_until(sock, b'{"status":"ok"}')
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.index(b"aHello") < data.index(b"[DONE]") < data.index(b'"ok"')


def test_a_request_sent_byte_by_byte(live):
    with live.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in raw_request({"prompt": "a", "max_tokens": 1}):
            sock.sendall(bytes([byte]))
        assert b'"text":"Hello"' in read_until(sock, b"}}")


def test_host_and_origin_are_checked(live):
    body = {"prompt": "x"}
    status, _, _ = http_post(live.address, "/v1/completions", body, {"Host": "evil.example"})
    assert status == 403
    status, headers, _ = http_post(
        live.address, "/v1/completions", body, {"Origin": "http://evil.example"}
    )
    assert status == 403
    assert "access-control-allow-origin" not in headers


def test_after_all_this_nothing_is_left(live):
    live.wait_for(lambda: not live.backend.running)
    assert not live.state.running


# -- processes -------------------------------------------------------------------------------


class Zygote:
    """Forks server processes; see ``fake_backend.zygote``."""

    def __init__(self, folder):
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *, port=0, step=0.05, timeout=10.0, mode="", seconds=0.0):
        self.count += 1
        log = self.folder / f"{self.count}.log"
        pid = self.ask({"log": str(log), "args": [port, step, timeout, mode, seconds]})
        return Served(self, pid, log)

    def close(self):
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


class Served:
    """One forked server process."""

    def __init__(self, zygote, pid, log):
        self.zygote, self.pid, self.log = zygote, pid, log
        self.address = None

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_ready(self):
        end = time.monotonic() + 20
        while "Squall ready at" not in self.output():
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)
        port = self.output().partition("http://127.0.0.1:")[2].split()[0]
        self.address = ("127.0.0.1", int(port))
        return self

    def signal(self, number=signal.SIGTERM):
        os.kill(self.pid, number)

    def exit_code(self):
        return self.zygote.ask({"wait": self.pid})

    def open_stream(self, prompt):
        sock = socket.create_connection(self.address, timeout=20)
        sock.sendall(raw_request({"prompt": prompt, "stream": True}))
        return sock, read_until(sock, b"Hello")

    def health(self):
        connection = http.client.HTTPConnection(*self.address, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    forker = Zygote(tmp_path_factory.mktemp("servers"))
    yield forker
    forker.close()


def test_the_ready_line_tells_everything():
    line = ready_line(fake.FakeBackend().card, "http://127.0.0.1:1234", 3.21)
    assert line == (
        "Squall ready at http://127.0.0.1:1234 | model org/fake | F32 fake | cpu (f32) | "
        "context 4096 | KV 8192 tokens | 3.2 s"
    )


def test_sigterm_drains(zygote):
    server = zygote.start(step=0.1).wait_ready()
    idle = socket.create_connection(server.address, timeout=10)
    sock, data = server.open_stream("hi")
    server.signal()
    deadline = time.monotonic() + 5
    while server.health()[1]["status"] != "draining":
        assert time.monotonic() < deadline
    status, headers, body = http_post(server.address, "/v1/completions", {"prompt": "new"})
    assert status == 503
    assert json.loads(body)["error"]["code"] == "draining"
    assert headers["connection"] == "close"
    data += read_until(sock, b"0\r\n\r\n")
    assert b"done" in data
    assert b"data: [DONE]" in data, "the running stream is finished"
    sock.close()
    assert server.exit_code() == 0
    assert "closed=True cancelled=0" in server.output()
    assert idle.recv(1) == b""
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


def test_a_drain_that_takes_too_long_is_cut(zygote):
    server = zygote.start(timeout=0.2).wait_ready()
    sock, data = server.open_stream("FOREVER")
    server.signal(signal.SIGINT)
    with sock:
        data += read_until(sock, b"0\r\n\r\n")
    assert b'data: {"error":' in data
    assert b"[DONE]" not in data
    assert server.exit_code() == 1
    assert "closed=True cancelled=1" in server.output()


def test_a_second_signal_forces(zygote):
    server = zygote.start(timeout=60.0).wait_ready()
    sock, data = server.open_stream("FOREVER")
    began = time.monotonic()
    server.signal()
    time.sleep(0.05)
    server.signal()
    with sock:
        data += read_until(sock, b"0\r\n\r\n")
    assert b'data: {"error":' in data
    assert server.exit_code() == 1
    assert time.monotonic() - began < 10


def test_engine_death_ends_requests_and_the_server(zygote):
    server = zygote.start(mode="die", seconds=1.0).wait_ready()
    sock, data = server.open_stream("FOREVER")
    waiting = ThreadPoolExecutor(1)
    answer = waiting.submit(http_post, server.address, "/v1/completions", {"prompt": "FOREVER"})
    with sock:
        data += read_until(sock, b"0\r\n\r\n")
    assert b'"code":"engine_dead"' in data
    assert b"[DONE]" not in data
    assert answer.result()[0] == 503
    waiting.shutdown()
    assert server.exit_code() == 1
    assert "the engine stopped" in server.output()


def test_loading_is_503_and_can_be_interrupted(zygote):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = zygote.start(port=port, mode="load", seconds=60.0)
    server.address = ("127.0.0.1", port)
    deadline = time.monotonic() + 10
    while True:
        try:
            status, body = server.health()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (status, body["status"]) == (503, "loading")
    status, headers, _ = http_post(server.address, "/v1/completions", {"prompt": "x"})
    assert (status, headers["retry-after"]) == (503, "5")
    server.signal()
    assert server.exit_code() == 0
    assert "Squall ready" not in server.output()


def test_what_loading_raises_comes_out_of_serve(zygote):
    server = zygote.start(mode="fail")
    assert server.exit_code() == 3
    assert "caught: model.gguf: truncated" in server.output()


def test_a_taken_port_ends_with_one_line_before_loading(zygote):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = zygote.start(port=port, mode="load", seconds=60.0)
        assert server.exit_code() == 2
    (line, _) = server.output().splitlines()
    assert line == (
        f"squall: port {port} on 127.0.0.1 is already in use; choose another one with --port"
    )
