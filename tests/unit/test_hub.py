"""Downloads from the hub, against a stub server on localhost."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from safetensors.torch import save

from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import ModelFiles, resolve
from squall.loaders.progress import Advance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHub(ThreadingHTTPServer):
    """The hub's API for model repositories, as much of it as a download uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token = "hf_good"
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut_after: dict[str, int] = {}  # file: bytes after which the connection breaks once

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]


class StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self, repo: str) -> bool:
        if repo not in self.server.repos:
            self.reply(401, b"{}", X_Error_Message="Invalid username or password.")
            return True
        if repo in self.server.gated:
            auth = self.headers.get("Authorization")
            if auth != f"Bearer {self.server.token}":
                status = 401 if auth is None else 403
                self.reply(status, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
                return True
        return False

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            self.reply(404)
        elif not self.refused(found[1]):
            revision = found[3] if api else found[2]
            if revision not in (None, "main", "v1", COMMIT):
                self.reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no rev")
            elif api:
                self.describe(self.server.repos[api[1]], api[1], api[2])
            else:
                self.send_content(self.server.repos[found[1]], found[3])

    do_HEAD = do_GET

    def describe(self, files: dict[str, bytes], repo: str, kind: str | None) -> None:
        entries = [
            {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
            for name, data in files.items()
        ]
        info: Any = entries
        if kind != "tree":
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries
            ]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_content(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="no entry")
            return
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut_after.pop(name, None)
        self.wfile.write(data[start:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    server = StubHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a network call was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


class Bytes:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done: list[int] = []

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        assert (name, unit) == ("download", "B")
        self.total = total
        yield self.done.append


WEIGHTS = save({"w": torch.arange(50_000, dtype=torch.float32)})
MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "original/model.safetensors": WEIGHTS,
    "README.md": b"# hi",
}
SAFE = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}


def names(files: ModelFiles) -> list[str]:
    return [path.name for path in files.paths]


def test_download_takes_only_what_a_model_needs(hub: StubHub, tmp_path: Path) -> None:
    hub.repos["org/model"] = MODEL
    progress = Bytes()
    files = resolve("org/model", endpoint=hub.url, cache_dir=tmp_path, progress=progress)
    assert (files.kind, files.name, names(files)) == (
        "safetensors",
        "org/model",
        ["model.safetensors"],
    )
    assert {path.name for path in files.folder.iterdir()} == SAFE
    assert files.paths[0].read_bytes() == WEIGHTS
    assert progress.total == sum(progress.done) == sum(len(MODEL[name]) for name in SAFE)
    assert min(progress.done) > 0


def test_cached_model_makes_no_network_call(
    hub: StubHub, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hub.repos["org/model"] = MODEL
    hub.repos["org/quants"] = {"a.Q4.gguf": b"GGUF4", "a.Q8.gguf": b"GGUF8"}
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    first = resolve("org/model", **options)
    quant = resolve("org/quants", "a.Q4.gguf", **options)
    request.getfixturevalue("no_network")
    assert resolve("org/model", **options) == first
    assert resolve("org/model@main", **options) == first
    assert resolve(f"org/model@{COMMIT}", **options) == first
    assert resolve("org/quants", "a.Q4.gguf", **options) == quant


def test_offline_says_what_is_missing(
    hub: StubHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    hub.repos["org/model"] = MODEL
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    files = resolve("org/model", **options)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    request.getfixturevalue("no_network")
    assert resolve("org/model", **options) == files
    with pytest.raises(ModelLoadError, match=r"org/other: not .* in the cache, and HF_HUB_OFFLINE"):
        resolve("org/other", **options)
    (files.folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE"):
        resolve("org/model", **options)


def test_incomplete_cache_fetches_only_the_missing_file(hub: StubHub, tmp_path: Path) -> None:
    hub.repos["org/model"] = MODEL
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    files = resolve("org/model", **options)
    path = files.folder / "tokenizer_config.json"
    path.resolve().unlink()
    path.unlink()
    hub.requests.clear()
    assert resolve("org/model", **options) == files
    assert path.read_bytes() == MODEL["tokenizer_config.json"]
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert not any(path.endswith(".safetensors") for path in fetched)


def test_broken_transfer_is_resumed(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/model"] = MODEL
    hub.cut_after["model.safetensors"] = 120_000
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    progress = Bytes()
    files = resolve("org/model", endpoint=hub.url, cache_dir=tmp_path, progress=progress)
    assert files.paths[0].read_bytes() == WEIGHTS
    starts = [at for method, path, at in hub.requests if at and path.endswith(".safetensors")]
    assert len(starts) == 1
    assert 0 < int(starts[0][6:].rstrip("-")) <= 120_000
    assert progress.total == sum(progress.done)


def test_sharded_repository(hub: StubHub, tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    repo = {"config.json": b"{}", "tokenizer.json": b"{}", "stray.safetensors": b"x"}
    repo |= {shards[0]: save({"a": torch.ones(1)}), shards[1]: save({"b": torch.ones(1)})}
    hub.repos["org/sharded"] = {**repo, "model.safetensors.index.json": json.dumps(index).encode()}
    files = resolve("org/sharded@v1", endpoint=hub.url, cache_dir=tmp_path)
    assert names(files) == shards
    assert not (files.folder / "stray.safetensors").exists()


def test_gguf_repositories(hub: StubHub, tmp_path: Path) -> None:
    split = {f"big-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)}
    hub.repos["org/one"] = {"m.gguf": b"GGUF", "mmproj-m.gguf": b"GGUF", "README.md": b""}
    hub.repos["org/many"] = {"a.gguf": b"GGUF", "sub/b.gguf": b"GGUF", **split}
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    one = resolve("org/one", **options)
    assert (one.kind, names(one), one.name) == ("gguf", ["m.gguf"], "org/one")
    assert {path.name for path in one.folder.iterdir()} == {"m.gguf"}
    with pytest.raises(ModelLoadError, match=r"org/many: 3 GGUF models.*a\.gguf, big-00001-of"):
        resolve("org/many", **options)
    assert names(resolve("org/many", "big-00002-of-00002.gguf", **options)) == sorted(split)
    assert names(resolve("org/many", "sub/b.gguf", **options)) == ["b.gguf"]
    with pytest.raises(ModelLoadError, match=r"no file c\.gguf; there: a\.gguf"):
        resolve("org/many", "c.gguf", **options)


def test_not_found(hub: StubHub, tmp_path: Path) -> None:
    hub.repos["org/model"] = MODEL
    hub.repos["org/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    with pytest.raises(ModelLoadError, match=r"org/absent: no such repository.*no token found"):
        resolve("org/absent", **options)
    with pytest.raises(ModelLoadError, match="org/model: no revision v9"):
        resolve("org/model@v9", **options)
    with pytest.raises(ModelLoadError, match=r"safetensors files with a config\.json, or GGUF"):
        resolve("org/pickles", **options)


@pytest.mark.parametrize("source", ["none", "cache", "literal:hf_bad"])
def test_gated_repository_names_the_token_source(hub: StubHub, tmp_path: Path, source: str) -> None:
    hub.repos["org/gated"] = MODEL
    hub.gated.add("org/gated")
    with pytest.raises(ModelLoadError) as caught:
        resolve("org/gated", token_source=source, endpoint=hub.url, cache_dir=tmp_path)
    message = str(caught.value)
    assert "access is restricted" in message
    assert f"token source used: {source.partition(':')[0]}" in message
    assert "hf_bad" not in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["literal", "env", "path", "cache"])
def test_gated_repository_opens_with_a_token(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.repos["org/gated"] = MODEL
    hub.gated.add("org/gated")
    (tmp_path / "token").write_text("hf_good\n")
    monkeypatch.setenv("HF_TOKEN" if kind == "cache" else "MY_TOKEN", "hf_good")
    values = {"literal": "hf_good", "env": "MY_TOKEN", "path": str(tmp_path / "token")}
    source = f"{kind}:{values[kind]}" if kind in values else kind
    files = resolve(
        "org/gated", token_source=source, endpoint=hub.url, cache_dir=tmp_path / "cache"
    )
    assert names(files) == ["model.safetensors"]


def test_hub_unreachable(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ModelLoadError, match="org/model: not in the cache, and the hub cannot"):
        resolve("org/model", endpoint=url, cache_dir=tmp_path)
