"""Experts in block-scaled FP8 against float64, and what their operator refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import ERROR_LIMITS, Case, relative_error, results
from squall.kernels.moe import fp8
from squall.kernels.quant import fp8_gemv

CPU = torch.device("cpu")


def act(y: Tensor, activation: str) -> Tensor:
    gate, up = y.chunk(2)
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return gate * torch.sigmoid(1.702 * gate) * up
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def matrix(data: Tensor, scales: Tensor, rows: int) -> Tensor:
    """float64 ``[N, K]``; the scales of each part of ``rows`` rows begin with it."""
    parts = []
    count = data.shape[0] // rows
    for part, own in zip(data.split(rows), scales.chunk(count), strict=True):
        row = torch.arange(rows) // (rows // own.shape[0])
        column = torch.arange(data.shape[1]) // 128
        parts.append(part.view(torch.float8_e4m3fn).double() * own.double()[row][:, column])
    return torch.cat(parts)


def formula(*args: Any) -> tuple[Tensor]:
    """Pair after pair."""
    x, norm, eps, up, up_scales, down, down_scales, ids, weights, activation, _, stream = args
    x, total = x.double(), stream.double().clone()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    dim, inner = down.shape[1:]
    for token, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            hidden = act(matrix(up[e], up_scales[e], inner) @ x[token], activation)
            y = matrix(down[e], down_scales[e], dim) @ hidden
            total[token] += weights[token, j] * y
    return (total.float(),)


def added(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the reference adds to the stream, and what it should."""
    args = case.build(dtype, CPU)
    zero = torch.zeros_like(args[-1])
    got = results(case, case.reference, (*args[:-1], zero.clone()))
    return got[0], formula(*args[:-1], zero)[0]


@pytest.mark.parametrize("dtype", ERROR_LIMITS)
@pytest.mark.parametrize("case", fp8.CASES, ids=lambda c: c.name)
def test_the_reference_matches_the_formula(case: Case, dtype: torch.dtype) -> None:
    got, want = added(case, dtype)
    assert relative_error(got, want) <= ERROR_LIMITS[dtype]


def test_the_stream_is_added_to(check_results) -> None:
    case = fp8.CASES[0]
    want = formula(*case.build(torch.float32, CPU))
    check_results(case, results(case, case.op, case.build(torch.float32, CPU)), want)


def test_opcheck() -> None:
    case = fp8.CASES[0]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(case.op, case.build(torch.float32, CPU), test_utils=tests)


@pytest.mark.parametrize(
    ("rows", "height"), [(2048, 128), (768, 128), (1408, 128), (192, 64), (48, 16), (141, 1)]
)
def test_blocks_belong_to_one_matrix(rows: int, height: int) -> None:
    assert fp8.row_height(rows) == height


def test_what_are_no_experts_is_refused() -> None:
    data, scales = torch.zeros((3, 96, 200), dtype=torch.uint8), torch.zeros(3, 6, 2)
    fp8.check_experts(data, scales, 48)  # gate and up
    for wrong in (
        (data, scales, 96),  # one matrix: blocks of 32
        (data, scales, 32),
        (data, scales[:2], 48),
        (data, scales.half(), 48),
        (data.view(torch.int8), scales, 48),
    ):
        with pytest.raises(AssertionError):
            fp8.check_experts(*wrong)


def test_the_cases_take_every_way() -> None:
    """A GEMV for one token, and sorted tiles of all sizes, with codes by words and by bytes."""
    ways, blocks, words = set(), set(), set()
    for case in fp8.CASES:
        args = case.build(torch.float32, CPU)
        (tokens, _), (experts, _, inner) = args[7].shape, args[5].shape
        fits = all(fp8_gemv.supports(args[i][0]) for i in (3, 5))
        ways.add("gemv" if tokens == 1 and fits else "sorted")
        if tokens > 0 and not (tokens == 1 and fits):
            blocks.add(fp8.block_for(args[7].numel(), experts))
            words.add(inner % 2)
    assert (ways, blocks, words) == ({"gemv", "sorted"}, {16, 32, 64, 128}, {0, 1})
