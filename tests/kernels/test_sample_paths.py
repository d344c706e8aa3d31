"""The sampling kernels with tiny chunks and lists, so that every path is taken, interpreted.

Run as any test this file starts itself once more with Triton's interpreter, which has to be chosen
before a kernel is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squall.kernels import sample
from squall.kernels.cases import random

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")

# chunk, slots, list: everything listed; lists per chunk that overflow; lists per row that overflow
CONFIGS = ((256, 256, 512), (128, 4, 256), (128, 128, 8))
MIX = (
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.2),
    (1.0, 0, 1.0, 1.0),
    (1.0, 3, 1.0, 0.0),
    (1.5, 200, 1.0, 0.0),
    (1.0, 399, 1.0, 0.0),
    (1.0, 0, 0.05, 0.0),
    (1.0, 0, 0.5, 0.0),
    (0.8, 0, 0.95, 0.0),
    (3.0, 0, 0.9999, 0.0),
    (1.0, 50, 0.9, 0.02),
    (1.0, 150, 0.9, 0.5),
    (0.0, 3, 0.5, 0.0),
)


@pytest.mark.skipif(INTERPRETED, reason="this is the second process")
def test_paths_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == len(CONFIGS) * len(sample.SHAPES)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", sample.SHAPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_path_draws_what_the_reference_draws(
    config: tuple[int, int, int], shape: str
) -> None:
    chunk, slots, listed = config
    rows = len(MIX)
    x = sample.SHAPES[shape](random((rows, 400), torch.float32, CPU, 91 + chunk + slots))
    values = sample.parameters(MIX, rows, CPU)
    ids = torch.full((rows,), -7, dtype=torch.int32)
    sample.launch(x, values, ids, {"chunk": chunk, "slots": slots, "list": listed, "warps": 4})
    assert ids.tolist() == sample.sample_tokens_reference(x, *values).tolist()
