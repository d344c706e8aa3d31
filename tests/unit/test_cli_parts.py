"""What the commands are made of: chat, progress, doctor, loading for ``squall serve``."""

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from squall import cli, doctor, serve
from squall.answer import Answer, printable, statistics
from squall.chat import chat
from squall.loaders.chat_template import TemplateError
from squall.loaders.errors import ModelLoadError
from squall.progress import LineProgress, amount, make_progress
from squall.runtime.options import EngineOptions
from squall.runtime.params import SamplingParams


def _load_fakes() -> ModuleType:
    path = Path(__file__).parents[1] / "fake_model.py"
    spec = importlib.util.spec_from_file_location("squall_fake_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fakes = _load_fakes()
FakeModel, TEXT, LIMIT = fakes.FakeModel, fakes.TEXT, fakes.LIMIT


def fake_squall(*args: str, **kwargs: Any) -> "subprocess.Popen[bytes]":
    """``squall run`` with the fake model."""
    return subprocess.Popen([sys.executable, str(fakes.__file__), *args], **kwargs)


# --- the chat ----------------------------------------------------------------------------------


class Terminal:
    """The fake squall on a pseudo terminal."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "SQUALL_CACHE": str(folder), "COLUMNS": "200"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = fake_squall(
            *args, env=env, start_new_session=True, preexec_fn=_own_terminal, **streams
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str) -> str:
        """Read until ``text`` comes; what came up to it, without escape sequences."""
        deadline = time.monotonic() + 30
        while text not in plain(self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                with contextlib.suppress(OSError):  # EIO: the process is gone
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = plain(self.seen).partition(text)
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leave(self) -> int:
        """Type Ctrl-C until the process ends. Once is not always enough: Python misses a signal
        that comes between the prompt and the wait for a key."""
        for _ in range(20):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.send("\x03")
                return self.process.wait(1)
        raise AssertionError("Ctrl-C does not end it")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there becomes a signal


def plain(text: str) -> str:
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", text).replace("\r", "")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_chat_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    header = terminal.expect("> ")
    assert "fake: F32, CPU (f32), context 300" in header
    assert "\\help lists the commands" in header
    terminal.send("hi\n")
    answered = terminal.expect("> ")
    assert "\nHello wörld[31m!\nprompt 8 tokens" in answered  # the escape is not passed on
    terminal.send("\\fly\n")
    assert "unknown command \\fly; the commands are \\help" in terminal.expect("> ")
    terminal.send("\\clear now\n")
    assert "\\clear takes nothing after it" in terminal.expect("> ")
    terminal.send("\\help\n")
    assert "\\system MSG" in terminal.expect("> ")
    terminal.send("x" * LIMIT + "\n")
    assert "the context length is 300" in terminal.expect("\\clear starts over\n> ")
    terminal.send("bad turn\n")
    assert "chat template: roles must alternate\n" in terminal.expect("> ")
    terminal.send("broken\n")
    assert "the step failed\n" in terminal.expect("> ")
    terminal.send("\\clear\n")
    assert "conversation cleared\n" in terminal.expect("> ")
    terminal.send("\\system be brief\n")
    assert "system message set\n" in terminal.expect("> ")
    terminal.send("forever\n")
    terminal.expect("Hello wörld[31m!Hello")
    terminal.send("\x03")
    assert re.search(r"\n\[stopped\]\nprompt .* \| stopped\n$", terminal.expect("> "))
    terminal.send("again\n")
    assert "\nHello wörld[31m!\n" in terminal.expect("> ")
    assert terminal.leave() == 0
    last = (tmp_path / "prompts").read_text().splitlines()[-1]
    assert last.startswith("<system>be brief<user>forever<assistant>Hello")
    assert last.endswith("<user>again")
    history = tmp_path / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "again" in history.read_text()


@pytest.mark.parametrize("last", ["\\exit", EOFError, KeyboardInterrupt])
def test_ways_to_leave_a_chat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: str | type[BaseException]
) -> None:
    lines = iter(["hi", "", last])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    model = FakeModel()
    assert chat(model, SamplingParams(), history=tmp_path / "history") == 0
    assert model.prompts == ["<user>hi"]
    assert next(lines, None) is None


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(TemplateError, match="--chat-template"):
        chat(FakeModel(template=None), SamplingParams())


# --- progress ----------------------------------------------------------------------------------


def test_progress_lines_nest() -> None:
    out = io.StringIO()
    progress = make_progress(out)
    assert isinstance(progress, LineProgress)
    with progress.phase("download", 92_900_000, "B"), progress.phase("check", None, "it"):
        pass
    with contextlib.suppress(RuntimeError), progress.phase("load", 30, "it"):
        raise RuntimeError
    text = re.sub(r"\d+\.\d s", "T", out.getvalue())
    assert text == (
        "download: 88.6 MiB ...\ncheck: ... done in T\ndownload: done in T\n"
        "load: 30 ... stopped after T\n"
    )


def test_progress_bars_on_a_terminal_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        progress = make_progress(stream)
        with progress.phase("download", 4 << 20, "B") as first:
            first(1 << 20)
            with progress.phase("load", 30, "it") as second:
                second(3)
                time.sleep(0.3)
    output = b""
    with contextlib.suppress(OSError):  # EIO: all has been read
        while True:
            output += os.read(master, 4096)
    os.close(master)
    shown = output.decode()
    assert "1.0 MiB of 4.0 MiB" in plain(shown)
    assert "3 of 30" in plain(shown)
    assert "\x1b[2K" in shown.rsplit("download", 1)[1]  # the line is erased afterwards
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(SimpleNamespace(isatty=lambda: True)), LineProgress)  # type: ignore[arg-type]


def test_amounts() -> None:
    counts = (0, 1023, 1024, 92_900_000, 5 << 30)
    assert [amount(n, "B") for n in counts] == ["0 B", "1023 B", "1.0 KiB", "88.6 MiB", "5.0 GiB"]
    assert amount(12, "it") == "12"


def test_statistics_of_next_to_nothing() -> None:
    nothing = Answer("", "abort", 3, 0, None, 0.5)
    assert statistics(nothing) == "prompt 3 tokens | answer 0 tokens | total 0.50 s | stopped"
    assert Answer("x", "stop", 3, 1, 0.5, 0.5).completion_tok_s is None
    assert printable("a\tb\n\x1b[0m\x07\x9bz\r") == "a\tb\n[0mz"


# --- doctor ------------------------------------------------------------------------------------


def findings(check: doctor.Check) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in check()}


def test_doctor_names_missing_and_old_packages() -> None:
    versions = {"torch": None, "rich": "1.0", "msgspec": "99.1", "xformers": None}
    found = findings(partial(doctor.check_packages, lambda name: versions.get(name, "99")))
    assert found["torch"].state == "fail"
    assert "pip install 'torch" in (found["torch"].mend or "")
    assert found["rich"].text.startswith("1.0, needed: >=")
    assert found["msgspec"] == doctor.Finding("ok", "msgspec", "99.1")
    assert found["xformers"].state == "ok"


def test_doctor_notices_what_else_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = findings(partial(doctor.check_devices, lambda: ["H200, 570.1, 143771 MiB"]))
    if gpu["cuda"].state == "fail":  # a machine without a GPU: this one is made up
        assert "GPU that torch cannot use" in gpu["cuda"].text
        assert gpu["cuda"].mend
    assert gpu["cpu"].state == "ok"
    monkeypatch.delenv("CC", raising=False)
    found = findings(partial(doctor.check_compiler, lambda name: None))
    assert found["c compiler"].state == "warn"
    assert "install" in (found["c compiler"].mend or "")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SQUALL_CACHE", str(blocked))
    assert findings(doctor.check_caches)["cache"].state == "fail"
    old = findings(partial(doctor.check_python, (3, 10)))
    assert old["python"].state == "fail"


def test_doctor_asks_the_hub_but_never_shows_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = findings(partial(doctor.check_hub, lambda url: "refused"))
    assert found["hub"].state == "warn"
    assert "cannot be reached (refused)" in found["hub"].text
    assert found["hub token"].text == "present"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in findings(partial(doctor.check_hub, pytest.fail))["hub"].text


def test_doctor_judges_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    def good() -> list[doctor.Finding]:
        return [doctor.Finding("ok", "a", "1"), doctor.Finding("warn", "b", "2", "do this")]

    def check_bad() -> list[doctor.Finding]:
        raise RuntimeError("broken\nprobe")

    assert doctor.doctor(checks=[good]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok    {'a':<16} 1",
        f"warn  {'b':<16} 2",
        f"{'':22} -> do this",
        "",
        "Squall can work here",
    ]
    assert doctor.doctor(checks=[good, check_bad], as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is False
    assert report["findings"][-1] == {
        "state": "fail",
        "name": "bad",
        "text": "cannot be checked: RuntimeError: broken probe",
        "mend": None,
    }


def test_version_ranges() -> None:
    assert doctor.in_range("2.13.0+cpu", ">=2.8,<2.14")
    assert not doctor.in_range("2.14.1", ">=2.8,<2.14")
    assert not doctor.in_range("2.7.9", ">=2.8,<2.14")
    assert doctor.in_range("2.8.3", "==2.8.*")
    assert not doctor.in_range("3.1.5", ">=3.1.6")


# --- serve: loading ----------------------------------------------------------------------------


class FakeEngine:
    """An engine process that loads until it is killed, or not at all."""

    def __init__(self) -> None:
        self.loading = threading.Event()
        self.killed = threading.Event()
        self.closed = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def open_forever(self, options: Any, progress: Any, on_child: Any) -> Any:
        on_child(self)
        self.loading.set()
        assert self.killed.wait(10)
        raise ModelLoadError("the engine process ended with code -9 while loading")

    def open_download(self, options: Any, progress: Any, on_child: Any) -> Any:
        with progress.phase("download", None, "B") as advance:
            self.loading.set()
            for _ in range(2000):
                advance(1)
                time.sleep(0.005)
        raise AssertionError("nobody stopped the download")

    def open_at_once(self, options: Any, progress: Any, on_child: Any) -> Any:
        on_child(self)
        return "backend", self

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("way", ["open_forever", "open_download"])
def test_a_cancelled_load_leaves_nothing(way: str) -> None:
    engine = FakeEngine()
    load = serve.loader(EngineOptions(), LineProgress(io.StringIO()), getattr(engine, way))

    async def cancel() -> float:
        task = asyncio.create_task(load())
        assert await asyncio.to_thread(engine.loading.wait, 10)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert asyncio.run(cancel()) < 3
    assert engine.killed.is_set() == (way == "open_forever")
    assert not [t for t in threading.enumerate() if t.name == "squall-load"]


def test_a_load_attaches_the_engine_or_fails() -> None:
    engine = FakeEngine()

    async def load(way: Any) -> Any:
        return await serve.loader(EngineOptions(), LineProgress(io.StringIO()), way)()

    assert asyncio.run(load(engine.open_at_once)) == "backend"
    assert engine.loop is not None
    engine.killed.set()
    with pytest.raises(ModelLoadError, match="code -9"):
        asyncio.run(load(engine.open_forever))


def test_serve_without_its_model_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "0", "-m", "/none"]) == 1
    assert capsys.readouterr() == ("", "squall: error: /none: no such file or folder\n")
