"""Paged attention for a step that holds prompts and whose lengths the host knows.

``prefill_attention`` computes what ``paged_attention`` does (``squall.kernels.attention.paged``);
``query_lens`` and ``contexts`` are the lengths of all sequences. Sequences go, in runs of one kind,
where they are fastest: single tokens to the decode kernel, long prompts whose whole context is in
this step to cuDNN, and all others to the paged prefill kernel.

cuDNN takes dense keys and values. They are gathered from the cache and not passed along by the
operator that wrote them: a gather moves 0.02 ms worth of memory for 8192 tokens of 8 heads of 128,
next to 1 ms of attention, and what is attended is then what later steps will read, also where the
cache is float8.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.decode import decode
from squall.kernels.attention.gather import gather_kv_launcher
from squall.kernels.attention.paged import build_batch, check, paged_attention
from squall.kernels.attention.prefill import prefill
from squall.kernels.attention.window import sees_all
from squall.kernels.cases import BF16, Case
from squall.kernels.op import op

# Below this many tokens a prompt's launches (gather, cuDNN, copy) should cost more than they save:
# an estimate, half the shortest prompt that was measured.
DENSE_FROM = 1024
DENSE_STEP = 256  # tokens: lengths are padded to a multiple of it


def prefill_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    longest = max(query_lens, default=0), max(contexts, default=0)
    index = block_tables, query_start, context_lens
    return paged_attention(q, k_cache, v_cache, *index, *longest, scale, window, softcap, sinks)


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@functools.cache
def _has_dense_kernel(device: torch.device) -> bool:
    """cuDNN's kernel on Hopper: measured on an H100, 401 and 576 TFLOP/s for prompts of 2048 and
    8192 tokens where flash attention 2 reaches 210 and 321."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]


def _takes_dense(q: Tensor, window: int, softcap: float, sinks: Tensor | None) -> bool:
    plain = softcap == 0 and sinks is None and q.dtype in (torch.float16, torch.bfloat16)
    # cuDNN's kernel counts as not deterministic
    plain = plain and not torch.are_deterministic_algorithms_enabled()
    return plain and q.shape[2] % 8 == 0 and q.shape[2] <= 128 and _has_dense_kernel(q.device)


def _kind(length: int, context: int, window: int, dense: bool) -> str:
    """Where a sequence goes."""
    if length == 1:
        return "decode"
    whole = length == context and sees_all(context, window)
    return "dense" if dense and whole and length >= DENSE_FROM else "paged"


def prefill_attention_launcher(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    check(q, k_cache, v_cache, block_tables, query_start, sinks)
    assert len(query_lens) == len(contexts) == block_tables.shape[0], f"{len(query_lens)} lengths"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    caches, limits = (k_cache, v_cache), (scale, window, softcap)
    dense = _takes_dense(q, window, softcap, sinks)
    starts = [0, *itertools.accumulate(query_lens)]
    kinds = [_kind(n, c, window, dense) for n, c in zip(query_lens, contexts, strict=True)]
    if kinds == ["dense"] and query_lens[0] == q.shape[0]:
        k, v = gather_kv_launcher(*caches, block_tables[0], contexts[0], q.dtype)
        return _causal(q, k, v, scale).contiguous()
    for kind, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        rows = list(run)
        first, end = rows[0], rows[-1] + 1
        index = block_tables[first:end], query_start[first : end + 1], context_lens[first:end]
        if kind == "decode":
            decode(q, *caches, index, limits, sinks, out)
        elif kind == "paged":
            tokens = starts[end] - starts[first]
            prefill(q, *caches, index, limits, sinks, out, tokens)
        else:
            for s in rows:
                k, v = gather_kv_launcher(*caches, block_tables[s], contexts[s], q.dtype)
                out[starts[s] : starts[s + 1]] = _causal(q[starts[s] : starts[s + 1]], k, v, scale)
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of a whole sequence, ``[n, H, D]`` and ``[n, KV, D]`` to ``[n, H, D]``.

    cuDNN makes a plan for every length it sees, which takes tens of milliseconds: prompts are
    padded to a length that others share. What is padded comes last, where no query sees it.
    """
    length = q.shape[0]
    if length % DENSE_STEP:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % DENSE_STEP)) for x in (q, k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    # What scaled_dot_product_attention calls: choosing cuDNN for it takes longer than its launch.
    y, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, False, 0.0, True, scale=scale
    )
    return y.squeeze(0).transpose(0, 1)[:length]


prefill_attention = op(
    "prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor query_start, Tensor context_lens, int[] query_lens, int[] contexts, "
    "float scale, int window, float softcap, Tensor? sinks) -> Tensor",
    prefill_attention_reference,
    prefill_attention_launcher,
    _fake,
)


def _case(
    name: str,
    lengths: tuple[tuple[int, int], ...],
    shape: tuple[int, int, int],
    limits: tuple[int, float] = (0, 0.0),
    options: str = "",
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        args = build_batch(lengths, shape, 16, limits, dtype, device, options)
        return *args[:6], [n for n, _ in lengths], [c for _, c in lengths], *args[8:]

    interpret = sum(c for _, c in lengths) < 500
    reference, launcher = prefill_attention_reference, prefill_attention_launcher
    title = f"prefill_attention-{name}"
    return Case(title, prefill_attention, reference, launcher, build, (), interpret, aot)


_SHORT = ((1, 40), (1, 7), (9, 9), (5, 60), (1, 3), (0, 20), (20, 20))
_LONG = ((1, 300), (1100, 1100), (1025, 1025), (50, 900), (1, 1), (2000, 2000))


def _cases() -> Iterator[Case]:
    yield _case("short", _SHORT, (4, 2, 16), aot=BF16)
    yield _case("short-all", _SHORT, (4, 2, 24), (8, 20.0), "fp8 sinks")
    yield _case("short-chunk", _SHORT, (4, 2, 16), (-8, 0.0))
    yield _case("empty", (), (4, 2, 16))
    yield _case("long", _LONG, (8, 2, 128))
    yield _case("long-fp8", _LONG, (4, 4, 64), (1500, 0.0), "fp8")
    yield _case("long-chunk", _LONG, (8, 2, 128), (-1100, 0.0))
    yield _case("one", ((1300, 1300),), (7, 1, 96))


CASES = tuple(_cases())
