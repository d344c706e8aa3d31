"""Other engines' figures (``bench/peers.json``) for the same work."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("peers.json")


@cache
def _cases() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    data = json.loads(PATH.read_text())
    return {**data["cases"], **data["cpu_2_cores_epyc_avx512"]}


def known_cases() -> list[str]:
    return list(_cases())


def rate(case: str | None, what: str, batch: int, prompt: int) -> dict[str, float]:
    """Tokens per second by engine for ``what`` ("decode" or "prefill"); empty where there are none.

    A decode figure is for ``batch`` prompts of 128 tokens, a prefill figure for one prompt.
    """
    found: dict[str, float] = {}
    for engine, figures in _cases().get(case or "", {}).items():
        value = figures.get(f"{what}_tok_s")
        if isinstance(value, dict):
            value = value.get(str(batch if what == "decode" else prompt))
        elif what == "prefill":
            value = figures.get(f"prefill_{prompt}_tok_s", value)
        elif batch != 1:
            value = None
        if value is not None and (what == "prefill" or prompt == 128):
            found[engine] = float(value)
    return found


def figure(case: str | None, key: str) -> dict[str, float]:
    """A single figure ("startup_s", "offline_512x(512+128)_out_tok_s") by engine."""
    engines = _cases().get(case or "", {})
    return {name: float(row[key]) for name, row in engines.items() if key in row}
