"""The command line, with the fake model of ``tests/fake_model.py``."""

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from squall import cli, doctor
from squall.failures import UsageError, exit_code, one_line
from squall.llm import GenerationError
from squall.loaders.chat_template import TemplateError
from squall.loaders.errors import ModelLoadError
from squall.run import RunOptions, run
from squall.runtime.client import StartupError
from squall.runtime.frontend import PromptTooLong
from squall.runtime.memory import KVMemoryError, OptionError
from squall.runtime.messages import Failed
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


def options(prompt: str | None = "hi", **given: Any) -> RunOptions:
    return RunOptions(EngineOptions(), SamplingParams(**given.pop("params", {})), prompt, **given)


# --- the command line itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice: 'fly' (choose from 'run', 'serve', 'models', 'doctor')"),
        (("run", "--bogus"), "unrecognized arguments: --bogus"),
        (("run", "--max-tok", "3"), "unrecognized arguments: --max-tok"),
        (("run", "-p"), "-p/--prompt: expected one argument"),
        (("run", "--max-tokens", "x"), "--max-tokens: 'x' is given, expected an integer from 1 to"),
        (("run", "--max-tokens", "0"), "--max-tokens: '0' is given, expected an integer from 1 to"),
        (("run", "--top-k", "2.5"), "--top-k: '2.5' is given, expected an integer from -1 to"),
        (("run", "--temperature", "nan"), "'nan' is given, expected a number from 0 to 100"),
        (("run", "--top-p", "0"), "'0' is given, expected a number above 0 and up to 1"),
        (("run", "--min-p", "1.1"), "'1.1' is given, expected a number from 0 to 1"),
        (("run", "--dtype", "f8"), "--dtype: invalid choice: 'f8' (choose from 'auto', 'f32'"),
        (("run", "--pa-blk-size", "7"), "--pa-blk-size: invalid choice: 7 (choose from 8, 16, 32"),
        (("run", "--pa-gpu-mem-usage", "1.5"), "expected a number above 0 and up to 1"),
        (("run", "--max-seqs", "-1"), "expected an integer from 1 to"),
        (("run", "--chat-template", "no.jinja"), "--chat-template: no.jinja: no such file"),
        (("run", "-f", "x", "-p", "hi"), "-f x: without -m this is the path of a .gguf file"),
        (("serve", "--port", "70000"), "--port: '70000' is given, expected an integer from 0 to"),
        (("serve", "--shutdown-timeout", "-1"), "expected a number from 0 to 86400"),
    ],
)
def test_usage_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"squall: error: [^\n]+\n", err)
    assert message in err


def test_a_mistyped_token_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--token-source", "hf_secret"]) == 2
    err = capsys.readouterr().err
    assert "accepted: literal:VALUE, env:VARIABLE, path:FILE, cache, none" in err
    assert "hf_secret" not in err


@pytest.mark.parametrize(("args", "code"), [(("-m", "/none"), 1), (("-f", "/none/x.gguf"), 1)])
def test_missing_models_are_one_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int
) -> None:
    assert cli.main(["run", "-p", "hi", *args]) == code
    err = capsys.readouterr().err
    assert err == f"squall: error: {args[1]}: no such file or folder\n"


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x"])
def test_unknown_devices_are_told_before_any_download(
    capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert cli.main(["run", "-p", "hi", "-m", "org/none", "--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith("squall: error: ")
    assert device in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["run"], ["serve"], ["doctor"]])
def test_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: squall")
    assert max(map(len, text.splitlines())) <= 80
    if command == ["run"]:
        assert "default: 0.7" in " ".join(text.split())
        assert all(name in text for name in ("--pa-ctxt-len", "--seed", "--raw", "--token-source"))
    if command == ["serve"]:
        assert "default: 127.0.0.1" in text
        assert "default: 1234" in text


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from squall.cli import main; code = main(['run', '--help']);"
        "heavy = {'torch', 'rich', 'uvloop', 'huggingface_hub', 'numpy'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"squall \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_options_reach_the_engine(tmp_path: Path) -> None:
    template = tmp_path / "c.jinja"
    template.write_text("x")
    flags = "-m some/model -f x.gguf --device cpu --dtype f32 --max-seq-len 99 --max-seqs 3 "
    flags += "--pa-gpu-mem 5 --pa-gpu-mem-usage .5 --pa-ctxt-len 64 --pa-blk-size 16 "
    flags += "--enforce-eager --attention-backend triton "
    flags += f"--token-source env:T --chat-template {template}"
    args = cli.build_parser().parse_args(["serve", *flags.split()])
    assert cli.engine_options(args) == EngineOptions(
        model="some/model",
        filename="x.gguf",
        device="cpu",
        dtype="f32",
        max_seq_len=99,
        max_seqs=3,
        pa_gpu_mem=5,
        pa_gpu_mem_usage=0.5,
        pa_ctxt_len=64,
        pa_blk_size=16,
        enforce_eager=True,
        attention_backend="triton",
        token_source="env:T",
        chat_template=str(template),
    )
    alone = cli.build_parser().parse_args(["run", "-f", "x.gguf"])
    assert cli.engine_options(alone) == EngineOptions(model=str(Path("x.gguf").absolute()))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no"), 2, "no"),
        (OptionError("no"), 2, "no"),
        (ModelLoadError("x.gguf:\n bad"), 1, "x.gguf: bad"),
        (KVMemoryError("too big"), 1, "too big"),
        (StartupError(Failed("too big", "KVMemoryError", "Traceback")), 1, "too big"),
        (StartupError(Failed("no", "DeviceError", "Traceback")), 2, "no"),
        (StartupError(Failed("odd", "IndexError", "Traceback")), 1, "internal error: IndexError:"),
        (FileNotFoundError(2, "gone", "a.txt"), 1, "[Errno 2] gone: 'a.txt'"),
        (IndexError("x"), 1, "internal error: IndexError: x (--debug shows where)"),
    ],
)
def test_errors_have_codes_and_a_line(error: Exception, code: int, line: str) -> None:
    assert exit_code(error) == code
    assert one_line(error).startswith(line)


@pytest.mark.parametrize("debug", [False, True])
def test_tracebacks_are_for_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def fail(**_: object) -> int:
        raise StartupError(Failed("no room", "KVMemoryError", "Traceback of the child\n"))

    monkeypatch.setattr(doctor, "doctor", fail)
    assert cli.main(["doctor", "--debug"] if debug else ["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.endswith("squall: error: no room\n")
    assert ("Traceback of the child" in err) == ("in fail" in err) == debug
    monkeypatch.setattr(doctor, "doctor", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


# --- run ---------------------------------------------------------------------------------------


def test_run_streams_the_answer_and_reports_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel()
    assert run(options(), model.open) == 0
    out, err = capsys.readouterr()
    assert out == TEXT + "\n"
    load, stats = err.splitlines()
    assert re.fullmatch(r"load: 3\.0 MiB \.\.\. done in \d\.\d s", load)
    rate = r", [\d.]+ tok/s"
    assert re.fullmatch(
        rf"squall: prompt 8 tokens{rate} \| answer 4 tokens{rate} \| "
        r"first after \d\.\d\d s \| total \d\.\d\d s",
        stats,
    )
    assert model.prompts == ["<user>hi"]
    assert model.closed


def test_run_tells_when_the_answer_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options(params={"max_tokens": 2}), FakeModel().open) == 0
    out, err = capsys.readouterr()
    assert out == "Hello wörld\n"
    assert err.endswith(" | cut: length limit\n")


def test_run_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options(json=True), FakeModel().open) == 0
    report = json.loads(capsys.readouterr().out)
    timings = report.pop("timings")
    assert report == {
        "model": "fake",
        "text": TEXT,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12},
    }
    assert list(timings) == [
        "load_s",
        "time_to_first_token_s",
        "prompt_tok_s",
        "completion_tok_s",
        "total_s",
    ]
    assert 0 < timings["time_to_first_token_s"] < timings["total_s"] < 10


def test_run_raw_and_models_without_template(capsys: pytest.CaptureFixture[str]) -> None:
    model, bare = FakeModel(), FakeModel(template=None)
    assert run(options("Once", raw=True), model.open) == 0
    assert model.prompts == ["Once"]
    assert "template" not in capsys.readouterr().err
    assert run(options("Once"), bare.open) == 0
    assert bare.prompts == ["Once"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "template" in line]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("data", "prompt", "message"),
    [
        ("Grüße\n".encode(), "Grüße", None),
        (b"two\nlines\r\n", "two\nlines", None),
        (b"", None, "the prompt is empty"),
        (b"ab\xff", None, "standard input is not valid UTF-8 (byte 2)"),
    ],
)
def test_run_reads_standard_input(
    monkeypatch: pytest.MonkeyPatch, data: bytes, prompt: str | None, message: str | None
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    model = FakeModel()
    if message is None:
        assert run(options(None, raw=True), model.open) == 0
        assert model.prompts == [prompt]
    else:
        with pytest.raises(UsageError, match=re.escape(message)):
            run(options(None), model.open)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", UsageError),
        ("\udcff", UsageError),
        ("bad turn", TemplateError),
        ("x" * LIMIT, PromptTooLong),
        ("broken", GenerationError),
    ],
)
def test_run_errors_close_the_model(prompt: str, error: type[Exception]) -> None:
    model = FakeModel()
    with pytest.raises(error):
        run(options(prompt), model.open)
    assert model.closed == (error is not UsageError)


def test_a_chat_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    for given in ({"json": True}, {"raw": True}, {}):
        with pytest.raises(UsageError, match="pipe it in"):
            run(options(None, **given), FakeModel().open)


def fake_squall(*args: str, **kwargs: Any) -> "subprocess.Popen[bytes]":
    """``squall run`` with the fake model."""
    return subprocess.Popen([sys.executable, str(fakes.__file__), *args], **kwargs)


@pytest.mark.parametrize("flag", ["", "json"])
def test_ctrl_c_keeps_what_there_is(flag: str) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with fake_squall("forever", flag, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(5) if not flag else process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if flag:
        report = json.loads(out)
        assert report["finish_reason"] == "abort"
        assert report["text"].startswith("Hello")
    else:
        assert first == b"Hello"
        assert out.endswith(b"\n")
        assert err.endswith(b" | stopped\n")


def test_a_reader_that_leaves_ends_the_run() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with fake_squall("forever", **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"Hello"
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read().count(b"\n") == 1  # the load
