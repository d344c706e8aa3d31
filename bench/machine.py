"""What the machine could do at best: measured ceilings, and the floors they give a model step."""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from squall.models.config import DecoderConfig


@dataclass(frozen=True)
class Ceilings:
    """Measured once per run."""

    read_bytes_s: float  # reading device memory
    matmul_flops_s: float  # a large matrix product in the model's dtype


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of a few large reads and matrix products on random data."""
    on_gpu = device.type != "cpu"
    count = (1 << 30) if on_gpu else (1 << 26)
    data = torch.rand(count, device=device)
    read = data.nbytes / _best_time(data.sum, device)
    side = 8192 if on_gpu else 1536
    a = torch.rand(side, side, device=device).to(dtype)
    flops = 2 * side**3 / _best_time(lambda: a @ a, device)
    return Ceilings(read, flops)


def decode_floor_s(
    config: DecoderConfig, weight_bytes: int, batch: int, context: int, ceilings: Ceilings
) -> float:
    """Least time of one decode step: every weight and every cached token read once, or the
    matrix products, whichever takes longer."""
    kv = batch * context * config.kv_bytes_per_token(2 if ceilings.matmul_flops_s > 1e13 else 4)
    memory = (weight_bytes + kv) / ceilings.read_bytes_s
    return max(memory, 2 * batch * matmul_weights(config) / ceilings.matmul_flops_s)


def prefill_floor_s(config: DecoderConfig, tokens: int, ceilings: Ceilings) -> float:
    """Least time of one prompt's matrix products and causal attention; one row of logits."""
    head = config.vocab_size * config.hidden_size
    linear = 2 * tokens * (matmul_weights(config) - head) + 2 * head
    attention = 2 * tokens**2 * config.num_layers * config.num_heads * config.head_dim
    return (linear + attention) / ceilings.matmul_flops_s


def matmul_weights(config: DecoderConfig) -> int:
    """Weights a token is multiplied with, head included and embedding not."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def describe(device: torch.device) -> dict[str, str]:
    """Device and versions, as every result records them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def resident_bytes() -> int:
    """Memory this process holds now (Linux; 0 elsewhere)."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _best_time(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
