"""Every figure of one GPU in one file: ``python bench/suite.py --out bench/results/h100.json``.

Runs ``bench/run.py`` once for each row of ``RUNS``, in a process of its own, and collects what they
write. The file is written after every run, so an interrupted suite keeps what it has; runs that are
in it already, from the same commit, are not repeated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squall.bench.machine import describe
from squall.kernels.backends.device import resolve_device

RUN = Path(__file__).with_name("run.py")
# What must be known first comes first: a suite may have to stop early.
RUNS: Mapping[str, str] = {
    "llama-3.1-8b q4_k_m": "--batch 1,8,32,128 --prefill 2048",
    "llama-3.1-8b": "--batch 1,8,32,128,256 --prefill 2048,8192 --long 16384",
    "llama-3.2-1b q4_k_m": "--batch 1 --prefill none",
    "llama-3.1-8b q8_0": "--batch 1 --prefill none",
    "mistral-7b q4_k_m": "--batch 1 --prefill none",
    "llama-3.2-1b": "--batch 1 --prefill none",
    "qwen3-30b-a3b": "--batch 1,8,64 --prefill 2048,8192",
    "qwen3-30b-a3b q4_k_m": "--batch 1 --prefill none",
    "mixtral-8x7b q4_k_m": "--batch 1 --prefill none",
    "deepseek-v2-lite": "--batch 1,64 --prompt-len 4096 --prefill none",
    "gemma-2-9b": "--batch 1 --prefill none",
    "phi-3.5-mini": "--batch 1 --prefill none",
    "qwen2.5-7b": "--batch 1 --prefill none",
    "llama-3.1-8b start": "--batch none --prefill none --startup",
}


def command(name: str, device: str, out: Path) -> list[str]:
    """The command line of one run."""
    case, _, kind = name.partition(" ")
    quant = ["--quant", kind] if kind not in ("", "start") else []
    head = [sys.executable, str(RUN), "--case", case, *quant, "--device", device]
    return [*head, *RUNS[name].split(), "--json", str(out)]


def pending(found: Mapping[str, Any], commit: str) -> list[str]:
    """Runs that are not in ``found`` or come from another commit."""
    return [name for name in RUNS if found.get(name, {}).get("commit") != commit]


def run_suite(out: Path, device: str, limit: float) -> int:
    """Run what is pending; 1 if a run failed or ``limit`` seconds were not enough."""
    runs: dict[str, Any] = json.loads(out.read_text())["runs"] if out.is_file() else {}
    end = time.monotonic() + limit
    left = pending(runs, describe(resolve_device(device))["commit"])
    failed = False
    for name in left:
        remaining = end - time.monotonic()
        if remaining <= 0:
            print(f"suite: no time left for {name}", file=sys.stderr)
            return 1
        print(f"suite: {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            try:
                done = subprocess.run(command(name, device, result), timeout=remaining, check=False)
            except subprocess.TimeoutExpired:
                print(f"suite: {name} did not end in time", file=sys.stderr)
                return 1
            if done.returncode:
                failed = True
                continue
            runs[name] = json.loads(result.read_text())
        out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/suite.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write or to complete")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS")
    args = parser.parse_args()
    return run_suite(args.out, args.device, args.limit)


if __name__ == "__main__":
    sys.exit(main())
