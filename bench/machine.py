"""What the machine could do at best: measured ceilings, and the floors they give a model step."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from squall.bench.cases import attention_shapes
from squall.kernels.attention.window import first_key
from squall.kernels.backends.device import backend_of
from squall.models.config import DecoderConfig, LayerConfig
from squall.models.decoder import Decoder
from squall.models.moe import MoE


@dataclass(frozen=True)
class Ceilings:
    """Measured once per run."""

    read_bytes_s: float  # reading device memory (summing it up)
    copy_bytes_s: float  # copying it, bytes read and bytes written
    matmul_flops_s: float  # a large matrix product in the model's dtype

    @property
    def memory_bytes_s(self) -> float:
        return max(self.read_bytes_s, self.copy_bytes_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of a few large reads, copies and matrix products on random data."""
    data = _large(device)
    read = data.nbytes / best_time(data.sum, device)
    del data
    side = 8192 if device.type != "cpu" else 1536
    a = torch.rand(side, side, device=device).to(dtype)
    flops = 2 * side**3 / best_time(lambda: a @ a, device)
    return Ceilings(read, copy_bytes_s(device), flops)


def copy_bytes_s(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    data = _large(device)
    other = torch.empty_like(data)
    return 2 * data.nbytes / best_time(lambda: other.copy_(data), device)


def _large(device: torch.device) -> torch.Tensor:
    """Far more than caches hold: 2 GiB, or 256 MiB on a CPU."""
    return torch.rand((1 << 29) if device.type != "cpu" else (1 << 26), device=device)


def streamed_bytes(model: Decoder, tokens: int) -> float:
    """Bytes of weights a step of ``tokens`` must read: all but an embedding that is not also the
    head, and of the experts those that tokens which choose evenly need on average."""
    separate = model.head is not model.embedding
    experts = sum(block.mlp.experts.nbytes for block in model.blocks if isinstance(block.mlp, MoE))
    rest = model.nbytes - experts - (model.embedding.nbytes if separate else 0)
    if model.config.moe is None:
        return rest
    moe = model.config.moe
    return rest + experts * (1 - (1 - moe.router.top_k / moe.experts) ** tokens)


def decode_floor_s(model: Decoder, batch: int, context: int, ceilings: Ceilings) -> float:
    """Least time of one decode step: every weight and every visible cached token read once, or the
    matrix products, whichever takes longer."""
    config = model.config
    token_layer = config.kv_bytes_per_token(model.dtype.itemsize) // config.num_caches
    kv = batch * token_layer * sum(visible_tokens(config, context))
    memory = (streamed_bytes(model, batch) + kv) / ceilings.memory_bytes_s
    return max(memory, 2 * batch * matmul_weights(config) / ceilings.matmul_flops_s)


def prefill_floor_s(model: Decoder, tokens: int, ceilings: Ceilings) -> float:
    """Least time of one prompt: its matrix products and causal attention with one row of logits,
    or reading every weight once, whichever takes longer."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    linear = 2 * tokens * (matmul_weights(config) - head) + 2 * head
    pairs = sum(visible_pairs(tokens, layer.window) for layer in config.layers)
    flops = linear + 2 * pairs * config.num_heads * (config.head_dim + config.value_dim)
    memory = streamed_bytes(model, tokens) / ceilings.memory_bytes_s
    return max(flops / ceilings.matmul_flops_s, memory)


def visible_pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a key that it sees, in one layer and a prompt of ``tokens``."""
    span = min(tokens, abs(window) or tokens)
    if window < 0:
        chunks, rest = divmod(tokens, span)
        return (chunks * span * (span + 1) + rest * (rest + 1)) // 2
    return span * (2 * tokens - span + 1) // 2


def visible_tokens(config: DecoderConfig, context: int) -> list[int]:
    """Tokens the newest token sees in each layer."""
    newest = context - 1
    return [context - max(0, first_key(newest, layer.window)) for layer in config.layers]


def matmul_weights(config: DecoderConfig) -> int:
    """Weights a token is multiplied with, head included and embedding not."""
    attention = sum(rows * columns for rows, columns in attention_shapes(config))
    mlp = 3 * config.hidden_size * sum(_mlp_size(config, layer) for layer in config.layers)
    return config.num_layers * attention + mlp + config.vocab_size * config.hidden_size


def _mlp_size(config: DecoderConfig, layer: LayerConfig) -> int:
    """Intermediate features a token passes through, those of its experts together."""
    if not layer.experts:
        return config.intermediate_size
    assert config.moe is not None
    return config.moe.router.top_k * config.moe.intermediate_size + config.moe.shared_size


def describe(device: torch.device) -> dict[str, str]:
    """Device, versions, date and commit, as every result records them."""
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
        "commit": commit(),
    }


def commit() -> str:
    """The commit that runs, with ``-dirty`` where files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def resident_bytes() -> int:
    """Memory this process holds now (Linux; 0 elsewhere)."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class MemoryMeter:
    """What a model and its engine take on a device, from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._free = torch.cuda.mem_get_info(device)[0]

    def read(self, weights: int, kv: int) -> dict[str, int]:
        """Bytes by name. On a GPU: what the device lost since, and the allocator's peak, each less
        weights and KV cache; on a CPU, what the process holds."""
        found = {"weights": weights, "kv": kv}
        if self._device.type != "cuda":
            return found | {"resident": resident_bytes()}
        used = self._free - torch.cuda.mem_get_info(self._device)[0]
        peak = torch.cuda.max_memory_reserved(self._device)
        return found | {
            "used_beyond": used - weights - kv,
            "reserved_peak_beyond": peak - weights - kv,
        }


def best_time(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls of ``work``, each until the device is done."""
    wait = backend_of(device).synchronize
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
