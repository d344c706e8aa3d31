"""tools/tokenize.py as a program: run by path, so that its folder comes first on sys.path."""

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

import squall.tools.tokenize as tool

SCRIPT = Path(tool.__file__)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    vocab = {t: i for i, t in enumerate(["[UNK]", "a", "b", "\r\n", "<s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" |\r\n"), "isolated")
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 4)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_run_by_path(model: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), str(model), "--text", "a<s>b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=model)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[4, 1, 4, 2]\n", "")


def test_no_special_still_parses(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(model), "--text", "a<s>", "--no-special"]) == 0
    assert capsys.readouterr().out == "[1, 4]\n"


def test_files_are_read_byte_for_byte(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "text").write_bytes(b"a\r\n")
    assert tool.main([str(model), "--file", str(model / "text"), "--no-special"]) == 0
    assert capsys.readouterr().out == "[1, 3]\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{}", "--file", "{}/bad"], "bad: not UTF-8: byte 1 is invalid start byte"),
        (["{}", "--file", "{}/none"], "none: cannot be read: No such file or directory"),
        (["{}", "--text", "a\udcff"], "--text: not UTF-8 at character 1"),
        (["{}/none", "--text", "a"], "none: no such file or folder"),
        (["{}/empty", "--text", "a"], "empty: tokenizer missing"),
        (["{}/bad", "--text", "a"], "bad: "),
    ],
)
def test_errors_are_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    (model / "bad").write_bytes(b"a\xff")
    (model / "empty").mkdir()
    assert tool.main([argument.format(model) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert captured.err.count("\n") == 1
