"""Seconds from the start of a process to the first token, phase by phase.

``measure_startup`` runs this file as a child process twice with Triton's and Inductor's caches in
one temporary folder: first empty ("cold"), then as the first run left them ("warm"). Native CPU
code and downloaded models stay where they are.
"""

import sys
import time

if __name__ == "__main__":
    _BEGAN = float(sys.argv[2])  # time.time() of the parent when it started this process

import json
import os
import subprocess
import tempfile
from pathlib import Path

import msgspec

from squall.bench.measure import BenchError, Load, run_load
from squall.bench.subject import Spec, open_subject
from squall.loaders.progress import NoProgress

PROMPT = 128  # tokens
STATES = ("cold", "warm")


def measure_startup(spec: Spec) -> list[dict[str, float | str]]:
    """A row for each of ``STATES``: seconds by phase, and "total". Nothing else may hold the
    device's memory meanwhile. ``BenchError`` when a child fails."""
    with tempfile.TemporaryDirectory(prefix="squall-bench-") as folder:
        caches = {
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
        }
        return [{"state": state, **_run(spec, caches)} for state in STATES]


def _run(spec: Spec, caches: dict[str, str]) -> dict[str, float]:
    packed = msgspec.json.encode(spec).decode()
    child = subprocess.run(
        [sys.executable, __file__, packed, repr(time.time())],
        env={**os.environ, **caches},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode:
        raise BenchError(f"the start-up run ended with code {child.returncode}")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def _child(spec: Spec, began: float) -> dict[str, float]:
    seconds = {"import": time.time() - began}
    subject = open_subject(spec, NoProgress())
    seconds |= subject.seconds
    seconds["first token"] = run_load(subject.engine, Load(1, PROMPT, 1), seed=0)
    seconds["total"] = time.time() - began
    return {name: round(value, 3) for name, value in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(_child(msgspec.json.decode(sys.argv[1], type=Spec), _BEGAN)))
