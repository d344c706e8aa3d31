"""The command line, with a fake model."""

import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from squall import cli, doctor
from squall.runtime.client import StartupError
from squall.runtime.memory import KVMemoryError, OptionError
from squall.runtime.messages import Failed
from squall.runtime.params import SamplingParams


def _fakes() -> ModuleType:
    path = Path(__file__).parents[1] / "fake_llm.py"
    spec = importlib.util.spec_from_file_location("squall_fake_llm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fakes = _fakes()
FakeLLM, WORDS = fakes.FakeLLM, fakes.WORDS


def fake_squall(*args: str, **kwargs: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, str(fakes.__file__), *args]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**pipes, "encoding": "utf-8", **kwargs})


@pytest.fixture
def squall(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process: (code, stdout, stderr)."""
    monkeypatch.setattr("squall.llm.LLM", FakeLLM)

    def run(*args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        try:
            code = cli.main(args)
        except SystemExit as leave:
            code = int(str(leave.code))
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_run_streams_the_answer_and_reports_on_stderr(squall: Any) -> None:
    code, out, err = squall("run", "-p", "hi")
    assert (code, out) == (0, "".join(WORDS) + "\n")
    load, stats = err.splitlines()
    assert re.fullmatch(r"load: 2\.5 MB in \d+\.\d s", load)
    assert re.fullmatch(
        r"prompt 8 tokens, [\d.]+ tok/s \| generated 4 tokens, [\d.]+ tok/s \| "
        r"first token after \d+\.\d\d s",
        stats,
    )
    assert FakeLLM.made.frontend.prompts == ["<user>hi"]


def test_run_json_is_one_object(squall: Any) -> None:
    code, out, _ = squall("run", "--json", "-p", "hi")
    report = json.loads(out)
    assert code == 0
    assert report["text"] == "".join(WORDS)
    assert report["finish_reason"] == "stop"
    assert report["model"] == "fake"
    assert report["usage"] == {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
    timings = report["timings"]
    assert 0 < timings["time_to_first_token_s"] <= timings["total_s"]
    assert timings["prompt_tokens_per_s"] == pytest.approx(8 / timings["time_to_first_token_s"])
    spent = timings["total_s"] - timings["time_to_first_token_s"]
    assert timings["generated_tokens_per_s"] == pytest.approx(3 / spent)


def test_run_reads_the_prompt_from_standard_input(squall: Any) -> None:
    code, _, _ = squall("run", "--raw", stdin="Grüße\n".encode())
    assert code == 0
    assert FakeLLM.made.frontend.prompts == ["Grüße\n"]


def test_run_passes_every_option_on(squall: Any) -> None:
    flags = "-m some/model -f x.gguf --device cpu --dtype f32 --max-seq-len 99 --max-seqs 3 "
    flags += "--pa-gpu-mem 5 --pa-gpu-mem-usage .5 --pa-ctxt-len 64 --pa-blk-size 16 "
    flags += "--token-source env:T --chat-template c.jinja --max-tokens 7 --temperature 0.3 "
    flags += "--top-p 0.8 --top-k 5 --min-p 0.1 --seed 11"
    assert squall("run", "-p", "x", *flags.split())[0] == 0
    made = FakeLLM.made
    assert made.model == "some/model"
    given = {k: v for k, v in made.options.items() if k not in ("max_queue", "token_budget")}
    assert given == {
        "filename": "x.gguf",
        "device": "cpu",
        "dtype": "f32",
        "max_seq_len": 99,
        "max_seqs": 3,
        "pa_gpu_mem": 5,
        "pa_gpu_mem_usage": 0.5,
        "pa_ctxt_len": 64,
        "pa_blk_size": 16,
        "token_source": "env:T",
        "chat_template": "c.jinja",
    }
    assert made.frontend.params == [
        SamplingParams(max_tokens=7, temperature=0.3, top_p=0.8, top_k=5, min_p=0.1, seed=11)
    ]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "required: COMMAND"),
        (("fly",), 2, "invalid choice: 'fly'"),
        (("run", "--bogus"), 2, "unrecognized arguments: --bogus"),
        (("run", "--max-tok", "3"), 2, "unrecognized arguments: --max-tok"),
        (("run", "--top-k", "2.5"), 2, "argument --top-k: '2.5' is not an integer"),
        (("run", "--dtype", "f8"), 2, "invalid choice: 'f8'"),
        (("run", "-p", "x", "--temperature", "nan"), 2, "temperature is nan, expected"),
        (("run", "-p", "x", "--max-tokens", "0"), 2, "max_tokens is 0, expected"),
        (("run", "-p", "x", "--pa-blk-size", "7"), 2, "--pa-blk-size is 7, accepted: 8, 16"),
        (("run", "-p", " "), 2, "the prompt is empty"),
        (("run",), 2, "the prompt is empty"),
        (("run", "-p", "\udcff"), 2, "the prompt is not UTF-8"),
        (("run", "-p", "x", "-m", "none"), 1, "none: no such file"),
        (("run", "-p", "x", "-m", "bare"), 2, "fake has no chat template: give one with"),
        (("run", "-p", "bad turn"), 1, "roles must alternate"),
        (("run", "-p", "x" * 600), 1, "the prompt has 606 tokens, the context length is 500"),
        (("run", "-p", "broken"), 1, "the step failed"),
        (("serve", "--port", "70000"), 2, "argument --port: 70000 is not from 0 to 65535"),
        (("serve", "--max-queue", "0"), 2, "--max-queue is 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_line(squall: Any, args: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = squall(*args)
    lines = [line for line in err.splitlines() if not line.startswith("load:")]
    assert found == code
    assert len(lines) == 1
    assert lines[0].startswith("squall: ")
    assert message in lines[0]


def test_standard_input_must_be_utf8(squall: Any) -> None:
    code, _, err = squall("run", stdin=b"ab\xff")
    assert (code, err) == (2, "squall: standard input is not UTF-8 at byte 2\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OptionError("bad flag"), 2, "bad flag"),
        (KVMemoryError("no room"), 1, "no room"),
        (
            StartupError(Failed("no such GPU", "DeviceError", "Traceback of the child")),
            2,
            "no such",
        ),
        (StartupError(Failed("bad\nfile", "ModelLoadError", "")), 1, "bad file"),
        (ValueError("odd\nthing"), 1, "internal error: ValueError: odd thing (--debug shows"),
        (RuntimeError(), 1, "internal RuntimeError"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_exit_codes_and_tracebacks(
    squall: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    line: str,
    debug: bool,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("squall.run.run", fail)
    found, _, err = squall("run", *(["--debug"] if debug else []))
    assert found == code
    assert err.splitlines()[-1].startswith(f"squall: {line}")
    assert ("Traceback" in err) == debug
    assert ("Traceback of the child" in err) == (debug and "GPU" in str(error))


def test_parsing_needs_no_heavy_import() -> None:
    code = (
        "import sys, squall.cli\n"
        "try: squall.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'uvloop', 'transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for args in (["--version"], ["run", "--help"], ["serve", "--bogus"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"
    version = subprocess.run(
        [sys.executable, "-m", "squall.cli", "--version"], capture_output=True, text=True
    )
    assert (version.returncode, version.stdout) == (0, "squall 0.1.0\n")


@pytest.mark.parametrize("command", [[], ["run"], ["serve"], ["doctor"]])
def test_help(squall: Any, command: list[str]) -> None:
    code, out, err = squall(*command, "--help")
    assert (code, err) == (0, "")
    assert "usage: squall" in out
    assert "None" not in out


def test_a_reader_that_leaves_is_no_error_message() -> None:
    process = fake_squall("run", "-p", "forever")
    assert process.stdout is not None
    assert process.stdout.read(6) == "again "
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(30) == 1
    assert "Traceback" not in err
    assert "squall:" not in err
    process.stderr.close()
    process.stdin.close()


def test_ctrl_c_ends_a_run() -> None:
    process = fake_squall("run", "-p", "forever")
    assert process.stdout is not None
    assert process.stdout.read(6) == "again "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_terminal_gets_a_chat_and_ctrl_c_stops_an_answer_then_leaves() -> None:
    master, slave = pty.openpty()
    process = fake_squall(
        "run", stdin=slave, stdout=slave, stderr=slave, start_new_session=True, encoding=None,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def expect(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    expect("> ")
    os.write(master, b"hi\n")
    expect("Hello wörld[31m!")  # its escape character is not obeyed
    expect("generated 4 tokens")
    expect("> ")
    os.write(master, b"forever\n")
    expect("again again")
    os.write(master, b"\x03")
    expect("(stopped)")
    expect("> ")
    os.write(master, b"\x03")
    assert process.wait(30) == 0
    os.close(master)


def test_serve_says_that_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = fake_squall("serve", "--port", str(port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {port} on 127.0.0.1 is already in use" in err


def test_serve_without_its_model_fails_in_one_line() -> None:
    process = fake_squall("serve", "--port", "0", "-m", "none")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == "squall: none: no such file\n"


def test_sigterm_ends_a_load() -> None:
    process = fake_squall("serve", "--port", "0", "-m", "slow")
    assert process.stderr is not None
    assert process.stderr.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err == "interrupted\n"


def test_version_ranges() -> None:
    assert doctor.in_range("2.13.0+cpu", ">=2.8,<2.14")
    assert not doctor.in_range("2.14.0", ">=2.8,<2.14")
    assert not doctor.in_range("2.7.1", ">=2.8")
    assert doctor.in_range("2.8.3", "==2.8.*")
    assert doctor.in_range("11", ">=11")
    names = dict(doctor.requirements())
    assert names["torch"] == "<2.14,>=2.8"
    assert "pytest" not in names


def test_doctor_reports_and_judges(squall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, out, err = squall("doctor")
    assert (code, err) == (0, "")
    for word in ("Python", "torch", "cpu ", "GiB free", "C compiler", "hub cache", "Ready."):
        assert word in out
    assert "http://127.0.0.1:9 cannot be reached" in out
    monkeypatch.setattr(doctor, "requirements", lambda: [("torch", ">=99"), ("no-such-thing", "")])
    code, out, _ = squall("doctor")
    assert code == 1
    assert "needed: >=99" in out
    assert "-> python -m pip install 'torch>=99'" in out
    assert "-> python -m pip install 'no-such-thing'" in out


def test_doctor_notices_a_gpu_that_torch_cannot_use(
    squall: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this GPU can be used")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: ["NVIDIA H100, 570.1, 81559 MiB"])
    monkeypatch.setattr(doctor, "check_hub", lambda: iter(()))
    code, out, _ = squall("doctor")
    assert code == 1
    assert "NVIDIA H100" in out
    assert "FAIL  GPU" in out
