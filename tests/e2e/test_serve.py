"""``squall serve`` as a process, with the demo model and the openai client."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from squall import LLM, SamplingParams
from squall.tools.fixtures import demo

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
START_SECONDS = 120


class Server:
    """One running ``squall serve``."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "squall.cli", "serve", "-m", str(demo())]
        command += ["--device", "cpu", "--port", str(self.port), "--max-seq-len", "512", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_until_ready(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[1])
            if self.get("/health")[0] == 200:
                return self
            time.sleep(0.1)
        raise AssertionError("the server did not become ready")

    def get(self, path: str) -> tuple[int, Any]:
        return self.call(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self.call(urllib.request.Request(self.url + path, data, headers))

    def call(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        except (urllib.error.URLError, ConnectionError):
            return 0, None

    def engine_pid(self) -> int:
        listed = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return int(listed.stdout.split()[0])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    try:
        yield running.wait_until_ready()
    finally:
        assert running.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def answer() -> str:
    """The greedy answer to QUESTION, by the Python API."""
    with LLM(str(demo()), device="cpu", max_seq_len=512) as llm:
        return llm.generate(QUESTION, SamplingParams(temperature=0.0, max_tokens=24))[0].text


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"max_tokens": 24, "temperature": 0.0, **options}
    return client.chat.completions.create(model="default", messages=QUESTION, **settings)


def test_the_ready_line_says_what_is_served(server: Server) -> None:
    (line,) = (line for line in server.lines if "ready" in line)
    for part in (server.url, "SmolLM2-135M-Instruct", "Q4_1 GGUF", "context 512", "KV "):
        assert part in line


def test_answers_equal_the_python_api(client: openai.OpenAI, answer: str) -> None:
    response = ask(client)
    assert response.choices[0].message.content == answer
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 24
    assert response.usage.total_tokens == response.usage.prompt_tokens + 24


def test_streaming(client: openai.OpenAI, answer: str) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 10


def test_eight_at_once(client: openai.OpenAI, answer: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        streams = pool.map(lambda _: list(ask(client, stream=True)), range(8))
        texts = ["".join(c.choices[0].delta.content or "" for c in chunks) for chunks in streams]
    assert texts == [answer] * 8


def test_logprobs_choices_and_completions(client: openai.OpenAI) -> None:
    response = ask(client, logprobs=True, top_logprobs=3, n=2, temperature=0.8, seed=3)
    assert [choice.index for choice in response.choices] == [0, 1]
    for choice in response.choices:
        entries = choice.logprobs.content
        spelled = bytes(byte for entry in entries for byte in entry.bytes)
        assert spelled.decode(errors="replace") == choice.message.content
        assert all(len(entry.top_logprobs) == 3 for entry in entries)
    done = client.completions.create(
        model="default", prompt=["The sea is", "1, 2, 3,"], max_tokens=4, temperature=0, echo=True
    )
    assert [choice.text[:7] for choice in done.choices] == ["The sea", "1, 2, 3"]


def test_a_lost_client_ends_its_request(server: Server, client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    begin = time.monotonic()
    ask(client, max_tokens=1)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b'{"messages": "\xff"}', 400, ""),
        ({"messages": QUESTION, "temperature": -1}, 400, "temperature"),
        ({"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": QUESTION, "top_p": 1e9}, 400, "top_p"),
        ({"messages": QUESTION, "bananas": 1}, 400, "bananas"),
        ({"messages": []}, 400, "messages"),
        ({"messages": QUESTION, "model": "gpt-7"}, 404, "gpt-7"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "512"),
        (b" " * (100 << 20), 413, ""),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, bytes) else f"{len(value)}B",
)
def test_bad_requests(server: Server, body: Any, status: int, words: str) -> None:
    found, error = server.post("/v1/chat/completions", body)
    assert found == status, error
    assert words in error["error"]["message"]
    assert server.get("/health")[0] == 200


def test_tokenize_and_back(server: Server) -> None:
    text = "Grüße, 世界 🦆"
    _, tokens = server.post("/tokenize", {"prompt": text})
    _, back = server.post("/detokenize", {"tokens": tokens["tokens"]})
    assert text in back.values()


def test_sigterm_lets_running_requests_finish() -> None:
    running = Server().wait_until_ready()
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        stream = iter(ask(client, stream=True, max_tokens=60, extra_body={"ignore_eos": True}))
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    assert running.stop() == 0


def test_a_dead_engine_ends_the_server() -> None:
    running = Server().wait_until_ready()
    engine = running.engine_pid()
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        stream = iter(ask(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True}))
        next(stream)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
    assert running.process.wait(30) == 1
    running.stop()


def test_a_killed_server_leaves_no_engine() -> None:
    running = Server().wait_until_ready()
    engine = Path(f"/proc/{running.engine_pid()}")
    running.process.kill()
    running.stop()
    deadline = time.monotonic() + 10
    while engine.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not engine.exists()
