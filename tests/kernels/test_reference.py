"""Every operator on the CPU against formulas written independently in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from squall.kernels.attention.paged import build_batch, paged_attention
from squall.kernels.cases import ERROR_LIMITS, Case, all_cases, relative_error, results
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.planes import Planes, dequantize

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Operators whose formulas are in a test file of their own.
ELSEWHERE = {
    "test_planes": "expand_planes plane_rows plane_gemv plane_gemv_pair plane_gemv_add",
    "test_attention_step": "decode_attention",
    "test_fp8": "fp8_expand fp8_rows fp8_linear fp8_norm_linear fp8_linear_add",
    "test_fp8_experts": "fp8_experts",
    "test_mla": "mla_query mla_decode mla_prefill gather_latents",
    "test_experts": "route dense_experts plane_experts",
    "test_sample": "sample_tokens_ penalize_ count_tokens_ gather_ids",
}
HERE = [
    case
    for case in all_cases()
    if case.op._schema.name.removeprefix("squall::") not in " ".join(ELSEWHERE.values()).split()  # type: ignore[attr-defined]
]
ROWS = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in HERE
    for dtype in DTYPES
    if dtype == torch.float32 or case.aot
]


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = x.double()
    return ((x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(dtype),)


def naive_rms_norm_add(x: Tensor, w: Tensor, eps: float, stream: Tensor) -> tuple[Tensor, ...]:
    return ((naive_rms_norm(x, w, eps, torch.float64)[0] + stream).float(),)


def naive_rope_store_kv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, ...]:
    """Token by token, rotated pairs as complex numbers times e^(i angle)."""
    kv_heads, dim = k_cache.shape[2:]
    x = qkv.double().reshape(qkv.shape[0], qkv.shape[1] // dim, dim)
    heads, half = x.shape[1] - 2 * kv_heads, table.shape[1] // 2
    k_cache, v_cache = k_cache.double(), v_cache.double()
    q_out = torch.empty((x.shape[0], heads, dim), dtype=torch.float64)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        angles = table[position].double()
        turn = torch.complex(angles[:half], angles[half:])
        q, k = x[t, :heads], x[t, heads : heads + kv_heads]
        turned = []
        for y, norm in ((q, q_norm), (k, k_norm)):
            if norm is not None:
                y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * norm
            z = torch.complex(y[:, :half].contiguous(), y[:, half : 2 * half].contiguous()) * turn
            turned.append(torch.cat((z.real, z.imag, y[:, 2 * half :]), -1))
        q_out[t] = turned[0]
        if slot >= 0:
            place = divmod(slot, k_cache.shape[1])
            k_cache[place], v_cache[place] = turned[1], x[t, heads + kv_heads :]
    return q_out, k_cache, v_cache


def naive_silu_mul(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = x.double().tensor_split(2, -1)
    return (gate / (1 + (-gate).exp()) * up,)


def naive_clamped_silu_mul(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = x.double().chunk(2, -1)
    gate, up = gate.minimum(torch.tensor(7.0)), up.minimum(torch.tensor(7.0))
    up = up.maximum(torch.tensor(-7.0))
    return ((gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)).to(x.dtype),)


def naive_gelu_tanh_mul(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = x.double().tensor_split(2, -1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1 + torch.tanh(inner)) * up,)


def naive_gather_kv(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    places = [divmod(i, k_cache.shape[1]) for i in range(length)]
    shape = (length, *k_cache.shape[2:])
    return tuple(
        torch.cat([cache.double()[int(table[b]), i] for b, i in places]).view(shape)
        if places
        else torch.empty(shape)
        for cache in (k_cache, v_cache)
    )


def seen_keys(position: int, window: int) -> Tensor:
    """Keys that a query sees: all, the last ``window``, or those of its own chunk."""
    keys = torch.arange(position + 1)
    if window < 0:
        return keys[keys // -window == position // -window]
    return keys[-window:]


def naive_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    _max_query: int,
    _max_context: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """Token by token, all keys gathered by slot."""
    size, kv_heads = k_cache.shape[1:3]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for s, context in enumerate(context_lens.tolist()):
        begin, end = query_start[s : s + 2].tolist()
        for t in range(begin, end) if context else ():
            position = context - (end - t)
            keys = seen_keys(position, window)
            places = (tables[s, keys // size].long(), keys % size)
            k, v = k_cache.to(q.dtype)[places].double(), v_cache.to(q.dtype)[places].double()
            kv_of_head = torch.arange(q.shape[1]) // (q.shape[1] // kv_heads)
            scores = (k * scale).transpose(0, 1)[kv_of_head] @ q[t].double()[:, :, None]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.squeeze(2).exp()
            total = weights.sum(-1) + (0 if sinks is None else sinks.double().exp())
            weights = (weights / total[:, None])[:, None]
            out[t] = (weights @ v.transpose(0, 1)[kv_of_head]).squeeze(1)
    return (out,)


def naive_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    y = x.double() @ w.double().t()
    return ((y if bias is None else y + bias.double()).to(dtype),)


def naive_norm_linear(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    x = naive_rms_norm(stream, norm, eps, w.dtype)[0]
    y = naive_linear(x, w, bias, torch.float64)[0]
    gates = {"none": lambda y: (y,), "silu": naive_silu_mul, "gelu_tanh": naive_gelu_tanh_mul}
    return (gates[activation](y)[0].to(dtype),)


def naive_linear_add(
    x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor
) -> tuple[Tensor, ...]:
    return ((stream + naive_linear(x, w, bias, torch.float64)[0]).float(),)


def naive_plane_gemm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *planes, kind, bias, activation, out = rest
    weight = dequantize(Planes(gguf_formats()[kind], x.shape[1], *planes))
    y = naive_linear(x, weight, bias, torch.float64)[0]
    gates = {"none": lambda y: (y,), "silu": naive_silu_mul, "gelu_tanh": naive_gelu_tanh_mul}
    return (gates[activation](y)[0].to(out.dtype),)


def naive_plane_gemm_pair(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    first, first_type, second, second_type, bias, out = rest
    parts = [
        naive_plane_gemm(x, *planes, kind, None, "none", out.double())[0]
        for planes, kind in ((first, first_type), (second, second_type))
    ]
    y = torch.cat(parts, 1)
    return ((y if bias is None else y + bias).to(out.dtype),)


def naive_plane_gemm_add(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *before, stream = rest
    y = naive_plane_gemm(x, *before, "none", stream.double())[0]
    return ((stream + y).float(),)


def naive_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return ((y if bias is None else y + bias).to(dtype),)


NAIVE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "squall::rms_norm": naive_rms_norm,
    "squall::rms_norm_add": naive_rms_norm_add,
    "squall::layer_norm": naive_layer_norm,
    "squall::rope_store_kv": naive_rope_store_kv,
    "squall::plane_gemm": naive_plane_gemm,
    "squall::plane_gemm_pair": naive_plane_gemm_pair,
    "squall::plane_gemm_add": naive_plane_gemm_add,
    "squall::linear": naive_linear,
    "squall::norm_linear": naive_norm_linear,
    "squall::linear_add": naive_linear_add,
    "squall::silu_mul": naive_silu_mul,
    "squall::gelu_tanh_mul": naive_gelu_tanh_mul,
    "squall::clamped_silu_mul": naive_clamped_silu_mul,
    "squall::gather_kv": naive_gather_kv,
    "squall::paged_attention": naive_paged_attention,
    "squall::prefill_attention": naive_paged_attention,
}


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _name(case: Case) -> str:
    return str(case.op._schema.name)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_op_and_reference_match_the_formula(case: Case, dtype: torch.dtype, check_results) -> None:
    """The registered operator (a backend's override where there is one) and the reference."""
    want = NAIVE[_name(case)](*case.build(dtype, CPU))
    for fn in (case.op, case.reference):
        args = case.build(dtype, CPU)
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        got = results(case, fn, args)
        check_results(case, got, want, dtype)
        for i, (now, then) in enumerate(zip(args, before, strict=True)):
            if isinstance(now, Tensor) and i not in case.mutates:
                assert torch.equal(_bytes(now), _bytes(then)), f"argument {i} changed"


@pytest.mark.parametrize("case", [c for c in HERE if c.interpret], ids=lambda c: c.name)
def test_results_have_the_dtype_and_are_dense(case: Case) -> None:
    args = case.build(torch.float16, CPU)
    for got in results(case, case.op, args)[: None if not case.mutates else 0]:
        assert got.dtype == torch.float16
        assert got.is_contiguous()


FIRST = {_name(c): c for c in reversed(HERE) if c.interpret and c.aot}


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_opcheck(case: Case) -> None:
    """Schema and mutation declared right, the fake result like the real one, also when traced."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = tuple(
        a.nan_to_num() if isinstance(a, Tensor) else a for a in case.build(torch.float32, CPU)
    )
    torch.library.opcheck(case.op, args, test_utils=tests)  # type: ignore[arg-type]


def test_case_names_are_unique_and_every_op_has_a_table() -> None:
    names = [c.name for c in all_cases()]
    assert len(set(names)) == len(names)
    assert {_name(c) for c in all_cases()} >= set(NAIVE)


def test_relative_error_sees_a_lost_nan_and_a_wrong_value() -> None:
    want = torch.tensor([1.0, 2.0, float("nan")])
    assert relative_error(want, want) == 0
    assert relative_error(torch.tensor([1.0, 2.0, 3.0]), want) == math.inf
    assert relative_error(torch.tensor([1.0, 2.2, float("nan")]), want) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shape"):
        relative_error(want[:2], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_reject_a_small_corruption(dtype: torch.dtype) -> None:
    """A limit that lets one key too many through attention would prove nothing."""
    case = next(c for c in all_cases() if c.name == "paged_attention-decode-d64")
    args: list[Any] = list(case.build(dtype, CPU))
    right = case.op(*args)
    args[5] = args[5] - 1  # context_lens: the newest key goes missing
    assert relative_error(case.op(*args), right) > ERROR_LIMITS[dtype]


def test_consecutive_blocks_give_the_same_as_scattered_ones() -> None:
    """The CPU reads consecutive blocks in place and gathers others."""
    args: list[Any] = list(
        build_batch(((1, 70), (20, 50)), (4, 2, 16), 8, (0, 0.0), torch.float32, CPU)
    )
    scattered = paged_attention(*args)
    used = [n for row in args[3].tolist() for n in row if n >= 0]
    assert used != sorted(used)
    for i in (1, 2):
        args[i] = args[i][used]
    counts = (args[3] >= 0).sum(1).tolist()
    args[3] = torch.full_like(args[3], -1)
    args[3][0, : counts[0]] = torch.arange(counts[0], dtype=torch.int32)
    args[3][1, : counts[1]] = torch.arange(counts[0], sum(counts), dtype=torch.int32)
    assert torch.equal(paged_attention(*args), scattered)
    alone = [*args[:3], args[3][1:], torch.tensor([0, 20], dtype=torch.int32), args[5][1:]]
    alone[0] = args[0][1:]
    assert torch.equal(paged_attention(*alone, *args[6:]), scattered[1:])
