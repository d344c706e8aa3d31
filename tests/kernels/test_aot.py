"""Every kernel compiles for A100 (sm_80) and H100 (sm_90) and fits their shared memory.

In processes of their own: a process that imported kernels for the interpreter cannot compile.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "aot_compile.py"
# Bytes of shared memory one block may use (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = {
    "_rms_norm_kernel",
    "_layer_norm_kernel",
    "_gemv_kernel",
    "_skinny_kernel",
    "_gated_kernel",
    "_rope_store_kernel",
    "_decode_kernel",
    "_prefill_kernel",
    "_survey_kernel",
    "_draw_kernel",
    "_penalize_kernel",
    "_count_kernel",
    "_gather_kernel",
    "_mla_query_kernel",
    "_mla_decode_kernel",
    "_mla_values_kernel",
    "_mla_prefill_kernel",
    "_gather_latents_kernel",
    "plane_gemm_kernel",
    "_expand_kernel",
    "plane_gemv_kernel",
    "_fp8_expand_kernel",
    "_fp8_gemv_kernel",
    "_fp8_skinny_kernel",
    "_fp8_grouped_kernel",
}


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Both chips at once: compiling is single-threaded."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = {
        chip: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(chip)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for chip in SHARED_LIMIT
    }
    yield started
    for process in started.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("chip", SHARED_LIMIT)
def test_kernels_compile_and_fit(chip: int, compilers: dict[int, subprocess.Popen[str]]) -> None:
    process = compilers[chip]
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-4000:]
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} >= KERNELS
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[chip], row
        assert row["cubin"] > 0, row
