"""Block sizes per GPU: tables written by ``tools/tune.py``, and what the tool needs to write them.

A kernel that has something to tune asks ``tuned(kernel, key, device)`` for its launch parameters
and falls back on rules of its own where the GPU, the kernel or the problem is not in a table. Rules
must work on Ampere and on Hopper. Nothing is ever tuned while serving.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from squall.kernels.lang import next_power_of_2

TABLES = Path(__file__).parent / "tuned"

Config = Mapping[str, int]  # launch parameters of one kernel, by name


@dataclass(frozen=True)
class Problem:
    """One row of a table: a size that a kernel is tuned for.

    ``build(device)`` allocates inputs (random, and enough copies of them to exceed the L2 cache)
    and returns a function that runs the kernel once, on the next copy, with the launch parameters
    it is given. ``candidates`` are the parameters to try.
    """

    key: str  # "n4096-k4096-m1"
    nbytes: int  # device memory the problem must move once
    build: Callable[[torch.device], Callable[[Config], None]]
    candidates: Sequence[Config]


def row_bucket(rows: int) -> int:
    """Numbers of rows of x that are tuned, and compiled, together: 1, 8, 16, 32, ..."""
    return 1 if rows == 1 else max(8, next_power_of_2(rows))


@functools.cache
def product_key(n: int, k: int, bucket: int) -> str:
    """A product's name in the tables: a weight ``[n, k]``, and its bucket of rows."""
    return f"n{n}-k{k}-m{bucket}"


@dataclass(frozen=True)
class Tunable:
    """A kernel file's ``TUNABLE``: ``problems(shapes)`` are its problems for a model whose weight
    matrices have these ``(out_features, in_features)``."""

    kernel: str
    problems: Callable[[Sequence[tuple[int, int]]], Iterable[Problem]]


def table_path(device_name: str) -> Path:
    """The table of a GPU: ``"NVIDIA H100 80GB HBM3"`` -> ``tuned/nvidia_h100_80gb_hbm3.json``."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return TABLES / f"{slug}.json"


@functools.cache
def _table(device: torch.device) -> Mapping[str, Mapping[str, Config]]:
    """Kernel -> key -> launch parameters; empty where there is no table."""
    if device.type != "cuda":
        return {}
    path = table_path(torch.cuda.get_device_name(device))
    if not path.is_file():
        return {}
    table: Mapping[str, Mapping[str, Config]] = json.loads(path.read_text())["kernels"]
    return table


def tuned(kernel: str, key: str, device: torch.device) -> Config | None:
    """Launch parameters for one problem on ``device``, or None."""
    return _table(device).get(kernel, {}).get(key)
