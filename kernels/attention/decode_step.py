"""Attention of a decode step, from the product with the weights of q, k, v to mixed values.

``decode_attention`` is ``squall.kernels.attention.rope_store`` followed by
``squall.kernels.attention.paged`` for sequences of at most one new token: head norms, rotary
embedding, the write to the cache and attention, in one launch. A launch less a layer, for a step
whose launches cost as much as its attention. Arguments are those of the two operators; every token
belongs to a sequence, and its slot, unless negative, is the place of its sequence's last key (so
one without context stores nothing). With a negative slot the last key is read from the cache like
all others. A cache of lower precision gives the newest key as it was stored.

Result: ``[T, H, D]`` of the dtype of ``qkv``, dense.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.attention.decode import Rope, decode
from squall.kernels.attention.paged import Lengths, build_batch, check, paged_attention
from squall.kernels.attention.rope_store import check_rope, rope_store_kv, rotary_table
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.op import op


def decode_attention_reference(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The two operators, which have faster implementations of their own on some devices."""
    q = rope_store_kv(qkv, q_norm, k_norm, eps, positions, cos_sin, k_cache, v_cache, slots)
    index = block_tables, query_start, context_lens
    limits = 1, max_context_len, scale, window, softcap
    return paged_attention(q, k_cache, v_cache, *index, *limits, sinks)


def _fake(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *_: object,
) -> Tensor:
    return torch.empty(_query(qkv, k_cache).shape, dtype=qkv.dtype, device=qkv.device)


def _query(qkv: Tensor, k_cache: Tensor) -> Tensor:
    """The part of the rows that are query heads, ``[T, H, D]``."""
    kv_heads, dim = k_cache.shape[2:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    return qkv[:, : heads * dim].view(qkv.shape[0], heads, dim)


def decode_attention_launcher(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    check_rope(qkv, positions, cos_sin, k_cache, v_cache, slots)
    q = _query(qkv, k_cache)
    check(q, k_cache, v_cache, block_tables, query_start, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or block_tables.shape[0] == 0:
        return out
    index, limits = (block_tables, query_start, context_lens), (scale, window, softcap)
    rope = Rope(q_norm, k_norm, eps, positions, cos_sin, slots)
    decode(q, k_cache, v_cache, index, limits, sinks, out, rope=rope)
    return out


decode_attention = op(
    "decode_attention(Tensor qkv, Tensor? q_norm, Tensor? k_norm, float eps, Tensor positions, "
    "Tensor cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor block_tables, "
    "Tensor query_start, Tensor context_lens, int max_context_len, float scale, int window, "
    "float softcap, Tensor? sinks) -> Tensor",
    decode_attention_reference,
    decode_attention_launcher,
    _fake,
)


def build_step(
    lengths: Lengths,
    shape: tuple[int, int, int],
    rotary: int,
    block_size: int,
    limits: tuple[int, float],
    dtype: torch.dtype,
    device: torch.device,
    options: str = "",
) -> tuple[object, ...]:
    """Arguments for sequences with 0 or 1 new tokens, as ``build_batch`` makes them; the place of
    every newest key holds NaN. ``options`` besides: "norm"; "skip": every third token's slot is
    negative, and its key in the cache; "int64" (positions and slots)."""
    heads, kv_heads, dim = shape
    args = build_batch(lengths, shape, block_size, limits, dtype, device, options)
    k_cache, v_cache, tables = args[1:4]
    last = [(s, context - 1) for s, (new, context) in enumerate(lengths) if new]
    slots = torch.full((len(last),), -1)
    for t, (s, p) in enumerate(last):
        if p >= 0 and not ("skip" in options and t % 3 == 0):
            place = int(tables[s, p // block_size]), p % block_size
            slots[t] = place[0] * block_size + place[1]
            k_cache[place], v_cache[place] = float("nan"), float("nan")
    positions = torch.tensor([max(p, 0) for _, p in last], dtype=torch.int64)
    if "int64" not in options:
        positions, slots = positions.int(), slots.int()
    qkv = random((len(last), (heads + 2 * kv_heads) * dim + 8), dtype, device, 61)[:, :-8]
    norms = [random((dim,), torch.float32, device, 62 + i) for i in range(2)]
    longest = args[7]
    return (
        qkv, *(norms if "norm" in options else (None, None)), 1e-6, positions.to(device),
        rotary_table(max(longest, 1), rotary).to(device), k_cache, v_cache, slots.to(device),
        *args[3:6], *args[7:],
    )  # fmt: skip


def _case(
    name: str,
    lengths: Lengths,
    shape: tuple[int, int, int],
    options: str = "",
    rotary: int | None = None,
    block_size: int = 16,
    limits: tuple[int, float] = (0, 0.0),
    interpret: bool = True,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        turned = rotary or shape[2]
        return build_step(lengths, shape, turned, block_size, limits, dtype, device, options)

    # Codes of float8 caches are compared by a test of their own.
    mutates = () if "fp8" in options else (6, 7)
    reference, launcher = decode_attention_reference, decode_attention_launcher
    title = f"decode_attention-{name}"
    return Case(title, decode_attention, reference, launcher, build, mutates, interpret, aot)


_SOME: Lengths = ((1, 1), (1, 63), (1, 64), (1, 65))


def _cases() -> Iterator[Case]:
    for dim, rotary in ((64, 64), (80, 32), (96, 96), (128, 128), (192, 64), (256, 256)):
        aot = {64: BF16, 80: BF16, 128: BOTH, 256: BOTH}.get(dim, ())
        options = "norm" if dim in (80, 128, 256) else ""
        yield _case(f"d{dim}", ((1, 65), (1, 7)), (4, 2, dim), options, rotary, aot=aot)
    for heads, kv_heads in ((2, 2), (9, 3), (4, 1), (7, 1), (16, 2), (16, 1), (40, 2), (70, 1)):
        yield _case(f"{heads}on{kv_heads}", ((1, 17), (1, 50)), (heads, kv_heads, 16), "norm")
    for block_size in (8, 32, 64):
        yield _case(f"block{block_size}", _SOME, (2, 1, 16), "int64", 8, block_size)
    yield _case("first", ((1, 1),), (4, 2, 16), "sinks", aot=BF16)
    yield _case("window", _SOME, (4, 2, 16), "", 16, 8, (20, 0.0), aot=BF16)
    yield _case("window1", _SOME, (4, 2, 16), "", 16, 8, (1, 0.0))
    yield _case("window2", _SOME, (4, 2, 16), "", 16, 8, (2, 0.0))
    yield _case("chunk", _SOME, (4, 2, 16), "", 16, 8, (-32, 0.0), aot=BF16)
    yield _case("chunk1", _SOME, (4, 2, 16), "", 16, 8, (-1, 0.0))
    yield _case("chunk-fp8", _SOME, (6, 2, 24), "fp8 norm sinks skip", 16, 8, (-9, 2.0))
    yield _case("softcap", _SOME, (4, 2, 16), "norm", limits=(0, 3.0), aot=BF16)
    yield _case("fp8", _SOME, (4, 2, 16), "fp8", 2, aot=BF16)
    yield _case("fp8-norm", _SOME, (6, 2, 24), "fp8 norm sinks skip", 16, 8, (9, 2.0))
    yield _case("skip", _SOME, (4, 2, 16), "skip norm int64")
    yield _case("empty", (), (4, 2, 16))
    yield _case("padded", ((1, 20), (1, 0), (0, 0), (0, 9), (1, 3)), (4, 2, 16), "norm")
    yield _case("parts", ((1, 600),), (4, 2, 16), "norm", aot=BF16)
    wide = tuple((1, 1 + 3 * i) for i in range(150))
    yield _case("wide", wide, (8, 2, 64), "norm", interpret=False, aot=BF16)
    uneven = ((1, 20000), *((1, 60 + i) for i in range(40)))
    yield _case("uneven", uneven, (8, 2, 64), "sinks", None, 32, interpret=False)
    yield _case("long", ((1, 5000), (1, 1000)), (9, 3, 64), "", None, 32, interpret=False)
    yield _case("long-groups", ((1, 3000),), (70, 1, 64), "norm", None, 32, interpret=False)
    yield _case("long-fp8", ((1, 5000),), (8, 2, 128), "fp8", None, 32, interpret=False)
    limits = (512, 0.0)
    yield _case("long-window", ((1, 3000),), (8, 2, 128), "", None, 32, limits, interpret=False)
    limits = (-1000, 0.0)  # a whole chunk, and a first token of one
    chunks = ((1, 3000), (1, 2001))
    yield _case("long-chunk", chunks, (8, 2, 128), "", None, 32, limits, interpret=False)


CASES = tuple(_cases())
