"""The table of models, and that no row of a registry goes untested."""

import json
import re
from pathlib import Path

import pytest

from squall.cli import main
from squall.loaders.gguf_architectures import ARCHITECTURES as GGUF
from squall.model_list import markdown, supported
from squall.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[2]


def test_the_document_is_up_to_date() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == markdown()


def test_every_architecture_is_listed() -> None:
    rows = supported()
    assert {row.hf_class for row in rows} == set(ARCHITECTURES)
    assert {row.gguf for row in rows} - {None} == set(GGUF)


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"family": "Qwen 3", "hf_class": "Qwen3ForCausalLM", "gguf": "qwen3"} in found
    assert main(["models"]) == 0
    assert "command-r" in capsys.readouterr().out


def test_every_architecture_has_golden_logits() -> None:
    folder = ROOT / "tests" / "e2e"
    cases, rows = ((folder / f"test_golden_{n}.py").read_text() for n in ("logits", "gguf"))
    for name in ARCHITECTURES:
        family = name.removesuffix("ForCausalLM")
        assert any(f'"{n}"' in cases for n in (family, f"{family}Text", name)), name
    for name in GGUF:
        assert re.search(rf'\(\s*"{name}",', rows), name
