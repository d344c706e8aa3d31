"""How many KV-cache blocks there is room for. Pure arithmetic: the numbers are measured elsewhere.

The budget is the first of these that the user gave:

1. ``pa_ctxt_len``: room for that many tokens in every layer, whatever their sequences;
2. ``pa_gpu_mem_usage``: that share of the device's memory, less all that is in use already and
   what the largest step needs;
3. ``pa_gpu_mem``: that many MiB.

Without any, a GPU gets a usage of 0.9. A CPU gets what all sequences at full length would need, at
most 4 GiB and half of the free memory: the operating system only commits pages that are used.

Groups of layers with a window (``squall.runtime.pages``) keep only the end of a long sequence, so
the longest one that fits may have more tokens than the cache has room for in every layer.
"""

import math
from dataclasses import dataclass

from squall.runtime.options import EngineOptions
from squall.runtime.pages import blocks_for, blocks_needed, longest_sequence

MIB = 1 << 20
GIB = 1 << 30
DEFAULT_GPU_USAGE = 0.9
CPU_LIMIT = 4 * GIB
BLOCK_SIZES = (8, 16, 32, 64)


class OptionError(ValueError):
    """An engine option has a value that cannot be used; the message is one line."""


class KVMemoryError(Exception):
    """The KV cache does not fit; the message is one line with all the numbers."""


@dataclass(frozen=True)
class MemoryFacts:
    """What was found on the device once the weights were loaded, in bytes."""

    device: str
    total: int
    free: int
    weights: int
    activations: int  # peak of the largest legal step, beyond the weights
    lazy: bool  # memory is only committed when touched (a CPU)


@dataclass(frozen=True)
class KVPlan:
    """``blocks`` of the cache, and the longest sequence (tokens) that fits into it."""

    blocks: int
    max_seq_len: int


def token_budget(options: EngineOptions, total: int, lazy: bool) -> int:
    """Tokens of one step on a device of ``total`` bytes (``lazy``: a CPU): long steps use a large
    GPU better, elsewhere they would only hold up running requests."""
    chosen = options.token_budget or (8192 if total >= 32 * GIB and not lazy else 2048)
    return max(chosen, options.max_seqs)


def check_options(options: EngineOptions) -> None:
    """Raise OptionError for the first value that is out of range."""
    for name in ("max_seqs", "max_queue"):
        _at_least_one(name, getattr(options, name))
    for name in ("token_budget", "max_seq_len", "pa_gpu_mem", "pa_ctxt_len"):
        if getattr(options, name) is not None:
            _at_least_one(name, getattr(options, name))
    usage = options.pa_gpu_mem_usage
    if usage is not None and not (math.isfinite(usage) and 0 < usage <= 1):
        raise OptionError(f"{_flag('pa_gpu_mem_usage')} is {usage}, expected above 0 and up to 1")
    if options.pa_blk_size not in BLOCK_SIZES:
        accepted = ", ".join(map(str, BLOCK_SIZES))
        raise OptionError(f"{_flag('pa_blk_size')} is {options.pa_blk_size}, accepted: {accepted}")


def check_length(options: EngineOptions, model_len: int) -> None:
    """Raise OptionError when a longer context is asked for than the model was made for (tokens)."""
    wanted = options.max_seq_len
    if wanted is not None and wanted > model_len:
        raise OptionError(f"--max-seq-len is {wanted}, the model's context length is {model_len}")


def plan_kv(
    options: EngineOptions,
    facts: MemoryFacts,
    block_bytes: int,
    model_len: int,
    windows: tuple[int, ...] = (0,),
) -> KVPlan:
    """Size the cache. ``block_bytes`` are those of one block, which serves one group of layers;
    ``model_len`` is the longest sequence the model was made for (tokens); ``windows`` are the
    tokens each group keeps (0: all).

    A ``max_seq_len`` the user gave must fit; otherwise the context is cut to what fits. Raises
    OptionError, KVMemoryError.
    """
    check_options(options)
    wanted, block_size = options.max_seq_len, options.pa_blk_size
    check_length(options, model_len)
    length = wanted or model_len
    room = facts.free - facts.activations
    budget = _budget(options, facts, block_bytes, length, windows)
    blocks = max(0, budget) // block_bytes
    capacity = longest_sequence(length, blocks, block_size, windows)
    if budget > room or capacity < (wanted or 1):
        needed = max(options.pa_ctxt_len or 0, wanted or block_size)
        fitting = max(0, min(budget, room)) // block_bytes
        fits = longest_sequence(model_len, fitting, block_size, windows)
        asked = blocks_needed(needed, block_size, windows) * block_bytes
        if options.pa_ctxt_len is not None:
            asked = max(asked, budget)
        raise KVMemoryError(_does_not_fit(facts, needed, asked, budget, fits))
    return KVPlan(blocks, capacity)


def _budget(
    options: EngineOptions,
    facts: MemoryFacts,
    block_bytes: int,
    length: int,
    windows: tuple[int, ...],
) -> int:
    """Bytes for the cache; may be negative."""
    if options.pa_ctxt_len is not None:
        return blocks_for(options.pa_ctxt_len, options.pa_blk_size) * len(windows) * block_bytes
    usage = options.pa_gpu_mem_usage
    if usage is None and options.pa_gpu_mem is not None:
        return options.pa_gpu_mem * MIB
    if usage is None and facts.lazy:
        everything = _all_at_full_length(options, facts, length, windows) * block_bytes
        return min(everything, CPU_LIMIT, (facts.free - facts.activations) // 2)
    used = facts.total - facts.free
    return int(facts.total * (usage or DEFAULT_GPU_USAGE)) - used - facts.activations


def _all_at_full_length(
    options: EngineOptions, facts: MemoryFacts, length: int, windows: tuple[int, ...]
) -> int:
    """Blocks for as many sequences as may run, of ``length`` tokens each, and for the tokens of one
    step, which windows keep until the next."""
    seqs, block_size = options.max_seqs, options.pa_blk_size
    step = blocks_for(token_budget(options, facts.total, facts.lazy), block_size)
    kept = seqs * blocks_needed(length, block_size, windows) + step * len(windows)
    return min(kept, seqs * blocks_for(length, block_size) * len(windows))


def _does_not_fit(facts: MemoryFacts, tokens: int, needed: int, budget: int, fits: int) -> str:
    advice = f"the largest context that fits is {fits} tokens (--max-seq-len {fits})"
    if fits == 0:
        advice = "not even one block fits: use a smaller model or another device"
    return (
        f"the KV cache does not fit on {facts.device}: {_gib(facts.total)} in all, "
        f"{_gib(facts.free)} free after loading {_gib(facts.weights)} of weights, "
        f"{_gib(facts.activations)} for activations, {_gib(max(0, budget))} allowed for KV, "
        f"{_gib(needed)} needed for {tokens} tokens; {advice}"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{_flag(name)} is {value}, expected at least 1")
