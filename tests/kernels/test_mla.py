"""Latent attention: the operators against float64 formulas, head by head and token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from squall.kernels.attention import mla_decode, mla_gather, mla_prefill, mla_query
from squall.kernels.attention.mla_prefill import _groups
from squall.kernels.cases import Case, results

CPU, DTYPES = torch.device("cpu"), (torch.float32, torch.float16, torch.bfloat16)


def rows(module: Any) -> list[Any]:
    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case in module.CASES
        if case.interpret
        for dtype in DTYPES
        if dtype == torch.float32 or case.aot
    ]


def rotated(x: Tensor, row: Tensor) -> Tensor:
    """The last elements of a vector, by complex numbers."""
    cos, sin = row.double().chunk(2)
    half = cos.shape[0]
    rest, a, b = x.double().split([x.shape[0] - 2 * half, half, half])
    y = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat((rest, y.real, y.imag))


@pytest.mark.parametrize(("case", "dtype"), rows(mla_query))
def test_query(case: Case, dtype: torch.dtype, check_results) -> None:
    q, latent, norm, eps, positions, table, cache, slots, kv_b = case.build(dtype, CPU)
    tokens, heads, dim = q.shape
    size, plain = norm.shape[0], dim - table.shape[1]
    want_cache = cache.double().flatten(0, 2)
    want = torch.zeros(tokens, heads, table.shape[1] + (0 if kv_b is None else size)).double()
    for t in range(tokens):
        angles = table[positions[t]]
        x = latent[t, :size].double()
        x = x / (x.square().mean() + eps).sqrt() * norm
        if slots[t] >= 0:
            want_cache[slots[t]] = torch.cat((x, rotated(latent[t, size:], angles)))
        for h in range(heads):
            y = rotated(q[t, h], angles)
            moved = [] if kv_b is None else [y[:plain] @ kv_b[h, :plain].double()]
            want[t, h] = torch.cat((*moved, y[plain:]))
    got = results(case, case.op, (q, latent, norm, eps, positions, table, cache, slots, kv_b))
    check_results(case, got, (want, want_cache.view(cache.shape)))


def keys_of(cache: Tensor, table: Tensor, context: int) -> Tensor:
    size = cache.shape[1]
    places = [int(table[j // size]) * size + j % size for j in range(context)]
    return cache.flatten(0, 2)[places].double()


@pytest.mark.parametrize(("case", "dtype"), rows(mla_decode))
def test_decode(case: Case, dtype: torch.dtype, check_results) -> None:
    q, cache, kv_b, tables, starts, contexts, values, scale = case.build(dtype, CPU)
    heads, _, latent = kv_b.shape
    want = torch.zeros(q.shape[0], heads, values).double()
    for s, context in enumerate(contexts.tolist()):
        t, end = starts[s : s + 2].tolist()
        if t == end or context == 0:
            continue
        keys = keys_of(cache, tables[s], context)
        for h in range(heads):
            weights = (keys @ q[t, h].double() * scale).softmax(0)
            want[t, h] = kv_b[h, -values:].double() @ (weights @ keys[:, :latent])
    check_results(case, results(case, case.op, case.build(dtype, CPU)), (want,))


@pytest.mark.parametrize(("case", "dtype"), rows(mla_prefill))
def test_prefill(case: Case, dtype: torch.dtype, check_results) -> None:
    args = case.build(dtype, CPU)
    q, q_pe, kv_b, cache, tables, _, _, lengths, contexts, scale = args
    heads, plain = q.shape[1:]
    latent, t = kv_b.shape[2], 0
    want = torch.zeros(q.shape[0], heads, kv_b.shape[1] - plain).double()
    for s, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        keys = keys_of(cache, tables[s], context)
        for i in range(length):
            seen = keys[: context - length + i + 1]
            for h in range(heads):
                expanded = seen[:, :latent] @ kv_b[h].double().T
                scores = expanded[:, :plain] @ q[t, h].double()
                scores += seen[:, latent:] @ q_pe[t, h].double()
                want[t, h] = (scores * scale).softmax(0) @ expanded[:, plain:]
            t += 1
    check_results(case, results(case, case.op, args), (want,))


@pytest.mark.parametrize(("case", "dtype"), rows(mla_gather))
def test_gather(case: Case, dtype: torch.dtype) -> None:
    cache, tables, contexts, first, last = args = case.build(dtype, CPU)
    keys = [keys_of(cache, tables[s], min(c, last)) for s, c in enumerate(contexts.tolist())]
    want = torch.cat([k[first:] for k in keys])
    assert torch.equal(case.op(*args).double(), want)


def test_absorbed_and_expanded_attention_are_the_same() -> None:
    """The two ways to attend, of the same queries and latents."""
    lengths = ((1, 30), (1, 5), (1, 1))
    q, q_pe, kv_b, *index, contexts, scale = mla_prefill.build_prompts(
        lengths, 3, (24, 20, 10, 12), torch.float32, CPU
    )
    expanded = mla_prefill.mla_prefill(q, q_pe, kv_b, *index, contexts, scale)
    moved = mla_query.absorbed(q, q_pe, kv_b)
    latents = mla_decode.mla_decode(moved, index[0], kv_b, *index[1:4], 12, scale)
    assert torch.allclose(latents, expanded, atol=1e-5)


def test_what_is_expanded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_prefill, "PIECE", 100)
    lengths = [1, 32, 33, 40, 40, 300, 50, 2, 40]
    contexts = [9000, 32, 33, 60, 8, 300, 50, 700, 70]
    found = list(_groups(lengths, contexts))
    assert found == [
        (False, 0, 2),
        (True, 2, 4),
        (True, 4, 5),
        (True, 5, 6),
        (True, 6, 7),
        (False, 7, 8),
        (True, 8, 9),
    ]


MODULES = (mla_query, mla_decode, mla_prefill, mla_gather)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_opcheck(module: Any) -> None:
    """Schema and mutation declared right, the fake result like the real one, also when traced."""
    case = next(case for case in module.CASES if case.interpret and case.aot)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = tuple(
        a.nan_to_num() if isinstance(a, Tensor) else a for a in case.build(torch.float32, CPU)
    )
    torch.library.opcheck(case.op, args, test_utils=tests)
