"""The CPU, and a paged attention for it on torch's fused SDPA.

Attention goes sequence by sequence. Where a sequence's blocks follow each other in the cache,
which is usual with few requests, its keys and values are views of the cache and nothing is
copied; otherwise its used blocks are gathered. Grouped query heads become rows (decode) or a
broadcast dimension (prefill), so kv heads are never repeated in memory.
"""

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.window import first_key
from squall.kernels.backends.device import Backend

if TYPE_CHECKING:
    from squall.kernels.native.cpu_ops import CpuOps

# Query rows handled at once where a mask is needed: bounds the mask and skips unseen keys.
_ROWS = 256


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``squall.kernels.attention.paged`` on the CPU; rows outside every sequence are zero."""
    single = max_query_len == 1 and max_context_len > 0
    native = _native_ops() if single and q.dtype == torch.float32 else None
    if native is not None and q.shape[0] == len(context_lens) and k_cache.dtype == q.dtype:
        return native.decode_attention(
            q, k_cache, v_cache, block_tables, context_lens, max_context_len, scale, window,
            softcap, sinks,
        )  # fmt: skip
    starts, contexts = query_start.tolist(), context_lens.tolist()
    whole = len(contexts) == 1 and starts[1] == q.shape[0] and contexts[0] > 0
    tables = block_tables.numpy()  # a view; indexing it is several times cheaper than a tensor's
    block_size = k_cache.shape[1]
    out = q if whole else torch.zeros(q.shape, dtype=q.dtype)
    for s, context in enumerate(contexts):
        begin, end = starts[s], starts[s + 1]
        if begin == end or context == 0:
            continue
        first = max(0, first_key(context - (end - begin), window))
        used = tables[s, first // block_size : -(-context // block_size)].tolist()
        k = _keys(k_cache, used, first, context)
        v = _keys(v_cache, used, first, context)
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        rows = q if whole else q[begin:end]
        values = _sequence(rows, k, v, scale, window, softcap, sinks)
        if whole:
            return values
        out[begin:end] = values
    return out


def _keys(cache: Tensor, used: list[int], first: int, end: int) -> Tensor:
    """Rows [first, end) of one sequence as ``[KV, 1, end - first, D]``.

    ``used`` are the blocks that hold them. Blocks in a row are read in place.
    """
    _, block_size, heads, dim = cache.shape
    start = first % block_size
    if used == list(range(used[0], used[0] + len(used))):
        start += used[0] * block_size
    else:
        cache = cache.index_select(0, torch.tensor(used))
    row = heads * dim
    offset = cache.storage_offset() + start * row
    return cache.as_strided((heads, 1, end - first, dim), (dim, row, row, 1), offset)


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``q [n, H, D]``, the last n positions of ``k``, ``v`` ``[KV, 1, c, D]``, to dense [n, H, D].

    The first key is one that the first query sees; with chunks it begins one, so that places count
    from there.
    """
    n, heads, dim = q.shape
    kv_heads, _, context, _ = k.shape
    plain = not softcap and sinks is None
    if n == 1 and plain:
        # Every key is visible. Heads of a group are the rows of one small problem a kv head.
        rows = q.reshape(kv_heads, 1, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(1, heads, dim)
    if n == context and not window and plain:
        return _fused(q, k, v, None, scale)
    out = torch.empty((n, heads, dim), dtype=q.dtype)
    for low in range(0, n, _ROWS):
        high = min(n, low + _ROWS)
        first = max(0, first_key(context - n + low, window))
        end = context - n + high
        positions = torch.arange(context - n + low, end).unsqueeze(1)
        keys = torch.arange(first, end)
        visible = keys <= positions
        if window:
            visible &= keys >= first_key(positions, window)
        chunk = q[low:high], k[:, :, first:end], v[:, :, first:end], visible, scale
        out[low:high] = _fused(*chunk) if plain else _explicit(*chunk, softcap, sinks)
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """SDPA; causal over all keys when ``visible`` is None. Kv heads are the batch dimension."""
    n, heads, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    rows = q.view(n, kv_heads, group, dim).permute(1, 2, 0, 3)
    k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=visible, is_causal=visible is None, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(n, heads, dim)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Scores as a matrix, float32: SDPA has neither softcap nor sinks."""
    n, heads, dim = q.shape
    kv_heads, _, keys, _ = k.shape
    rows = q.float().view(n, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    k, v = k.squeeze(1).float(), v.squeeze(1).float()
    scores = torch.bmm(rows, k.transpose(1, 2)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(kv_heads, -1, n, keys).masked_fill_(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.view(kv_heads, -1, 1, 1).expand(-1, -1, n, 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., :keys].reshape(kv_heads, -1, keys)
    values = torch.bmm(weights, v).view(kv_heads, -1, n, dim)
    return values.permute(2, 0, 1, 3).reshape(n, heads, dim).to(q.dtype)


def _read_int(path: Path) -> int | None:
    """A cgroup number; None when absent or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _memory(device: torch.device) -> tuple[int, int]:
    """The machine's, or the control group's (v2) where that is smaller.

    Where the system does not say what is free (macOS), half of the total counts as free.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total // 2
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines}
        free = kib["MemAvailable:"] * 1024
    limit = _read_int(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < total:
        used = _read_int(Path("/sys/fs/cgroup/memory.current")) or 0
        total, free = limit, max(0, min(free, limit - used))
    return free, total


def _describe(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def _native_ops() -> "CpuOps | None":
    """The native operators, brought in by the first call; None where they cannot be had."""
    from squall.kernels.native import cpu_ops  # imports the operators, which look here
    from squall.kernels.native.build import Unavailable

    try:
        return cpu_ops.enable()
    except Unavailable:
        return None  # the quantised product's warning tells why


def _prepare() -> None:
    from squall.kernels.quant.cpu_native import enable  # as above

    enable()
    _native_ops()


BACKEND = Backend(
    type="cpu",
    dispatch_key="CPU",
    rank=9,
    available=lambda: None,
    count=lambda: 1,
    describe=_describe,
    synchronize=lambda device: None,
    memory=_memory,
    default_dtype=lambda device: torch.float32,
    prepare=_prepare,
    overrides={"paged_attention": paged_attention},
)
