"""``decode_attention``: the operator against a float64 formula, and the launch it saves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from squall.kernels.attention import decode_step
from squall.kernels.attention.decode_step import build_step, decode_attention
from squall.kernels.attention.fp8 import to_cache_dtype
from squall.kernels.attention.paged import paged_attention
from squall.kernels.attention.rope_store import rope_store_kv
from squall.kernels.cases import ERROR_LIMITS, Case, relative_error, results
from tests.kernels.test_reference import seen_keys

CPU, DTYPES = torch.device("cpu"), (torch.float32, torch.float16, torch.bfloat16)
ROWS = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in decode_step.CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.aot
]


def turned(x: Tensor, norm: Tensor | None, eps: float, row: Tensor) -> Tensor:
    """Heads [N, D], rotated by a matrix."""
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    cos, sin = row.double().chunk(2)
    half = cos.shape[0]
    matrix = torch.eye(x.shape[1], dtype=torch.float64)
    for i in range(half):
        matrix[i, i], matrix[i, i + half] = cos[i], -sin[i]
        matrix[i + half, i], matrix[i + half, i + half] = sin[i], cos[i]
    return x @ matrix.T


def naive(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    tables: Tensor,
    query_start: Tensor,
    contexts: Tensor,
    _longest: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence by sequence, head by head."""
    size, kv_heads, dim = k_cache.shape[1:]
    x = qkv.double().unflatten(1, (-1, dim))  # type: ignore[no-untyped-call]
    heads = x.shape[1] - 2 * kv_heads
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out = torch.zeros((x.shape[0], heads, dim), dtype=torch.float64)
    for s, context in enumerate(contexts.tolist()):
        t, end = query_start[s : s + 2].tolist()
        if t == end or context == 0:
            continue
        angles = table[positions[t]]
        q = turned(x[t, :heads], q_norm, eps, angles).to(qkv.dtype).double()
        if slots[t] >= 0:
            place = divmod(int(slots[t]), size)
            k = turned(x[t, heads : heads + kv_heads], k_norm, eps, angles)
            k_cache[place] = to_cache_dtype(k, k_cache.dtype)
            v_cache[place] = to_cache_dtype(x[t, heads + kv_heads :], v_cache.dtype)
        keys = seen_keys(context - 1, window)
        places = tables[s, keys // size].long(), keys % size
        for head in range(heads):
            kv = head * kv_heads // heads
            scores = k_cache[places][:, kv].to(qkv.dtype).double() @ q[head] * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            sink = 0.0 if sinks is None else sinks[head].double().exp()
            weights = scores.exp() / (scores.exp().sum() + sink)
            out[t, head] = weights @ v_cache[places][:, kv].to(qkv.dtype).double()
    return out, k_cache, v_cache


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_op_and_reference_match_the_formula(case: Case, dtype: torch.dtype, check_results) -> None:
    want = naive(*case.build(dtype, CPU))
    for fn in (case.op, case.reference):
        args = case.build(dtype, CPU)
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        got = results(case, fn, args)
        assert got[0].dtype == dtype
        assert got[0].is_contiguous()
        check_results(case, got, want[: len(got)])
        for i, (now, then) in enumerate(zip(args, before, strict=True)):
            if isinstance(now, Tensor) and i not in (6, 7):
                assert torch.equal(now, then), f"argument {i} changed"


def test_opcheck() -> None:
    """Schema and mutation declared right, the fake result like the real one, also when traced."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    case = decode_step.CASES[0]
    args = tuple(
        a.nan_to_num() if isinstance(a, Tensor) else a for a in case.build(torch.float32, CPU)
    )
    torch.library.opcheck(case.op, args, test_utils=tests)  # type: ignore[arg-type]


def on_gpu(lengths: tuple[tuple[int, int], ...], options: str = "") -> list[Any]:
    shape, cuda = (8, 2, 128), torch.device("cuda")
    return list(build_step(lengths, shape, 128, 32, (0, 0.0), torch.bfloat16, cuda, options))


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "fp8"])
def test_two_launches_store_the_same_bits(options: str) -> None:
    lengths = tuple((1, 1 + 37 * i) for i in range(30))
    fused, apart = on_gpu(lengths, options), on_gpu(lengths, options)
    got = decode_attention(*fused)
    q = rope_store_kv(*apart[:9])
    want = paged_attention(q, *apart[6:8], *apart[9:12], 1, *apart[12:])
    for i in (6, 7):
        assert torch.equal(fused[i].view(torch.uint8), apart[i].view(torch.uint8))
    assert relative_error(got, want) <= ERROR_LIMITS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 40])
def test_one_graph_serves_any_context_length(batch: int) -> None:
    """Captured with idle rows, as the engine does, and replayed with what a step writes."""
    steps = [on_gpu(tuple((1, max(1, (2000 - 7 * i) // n)) for i in range(batch)), "norm")
             for n in (1, 3, 50, 2000)]  # fmt: skip
    args = [a.clone() if isinstance(a, Tensor) else a for a in steps[0]]
    args[8].fill_(-1)
    args[11].zero_()
    decode_attention(*args)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*args)
    for step in steps:
        want = naive(*[a.cpu() if isinstance(a, Tensor) else a for a in step])
        blocks, width = step[6].shape[0], step[9].shape[1]
        args[6][:blocks], args[7][:blocks], args[9][:, :width] = step[6], step[7], step[9]
        for i in (0, 4, 8, 11):
            args[i].copy_(step[i])
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, want[0]) <= ERROR_LIMITS[torch.bfloat16]
        for i, cache in ((6, want[1]), (7, want[2])):
            assert relative_error(args[i][:blocks], cache) <= ERROR_LIMITS[torch.bfloat16]
