"""Block-scaled FP8 weights: the operators against float64, stacks and rows of them, and the kernels
with launch parameters that no rule picks here.

``python test_fp8.py interpret`` and ``python test_fp8.py compile 90`` run the latter in processes
of their own, as ``test_linear.py`` does.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import ERROR_LIMITS, Case, random, relative_error, results
from squall.kernels.counters import counters
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.quant import fp8, fp8_gemv, fp8_linear, fp8_skinny, fp8_tunables
from squall.kernels.quant.fp8 import fp8_expand, random_fp8
from squall.kernels.quant.fp8_weight import Fp8Weight
from squall.kernels.tuning import Config
from squall.kernels.weight import DenseWeight, Stack, merge

CPU = torch.device("cpu")
CASES = fp8.CASES + fp8_linear.CASES


def number(code: int) -> float:
    """float8_e4m3fn from its definition."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


CODES = torch.tensor([number(code) for code in range(256)], dtype=torch.float64)


def matrix(data: Tensor, scales: Tensor, height: int) -> Tensor:
    """float64 ``[N, K]``, each weight's scale looked up on its own."""
    row, column = torch.arange(data.shape[0]), torch.arange(data.shape[1])
    return CODES[data.long()] * scales.double()[row[:, None] // height, column[None] // 128]


def gated(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    gate, up = y.tensor_split(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def expand_formula(*args: Any) -> tuple[Tensor, ...]:
    *weight, start, stop, dtype = args
    return (matrix(*weight)[start:stop].to(dtype),)


def rows_formula(*args: Any) -> tuple[Tensor, ...]:
    *weight, ids, dtype = args
    return (matrix(*weight)[ids.long()].to(dtype),)


def linear_formula(*args: Any) -> tuple[Tensor, ...]:
    x, *weight, bias, dtype = args
    y = x.double() @ matrix(*weight).t()
    return ((y if bias is None else y + bias).to(dtype),)


def norm_formula(*args: Any) -> tuple[Tensor, ...]:
    stream, norm, eps, *weight, bias, activation, _, dtype = args
    x = stream.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    (y,) = linear_formula(x, *weight, bias, torch.float64)
    return (gated(y, activation).to(dtype),)


def add_formula(*args: Any) -> tuple[Tensor, ...]:
    *inputs, stream = args
    return ((linear_formula(*inputs, torch.float64)[0] + stream).float(),)


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "squall::fp8_expand": expand_formula,
    "squall::fp8_rows": rows_formula,
    "squall::fp8_linear": linear_formula,
    "squall::fp8_norm_linear": norm_formula,
    "squall::fp8_linear_add": add_formula,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operators_match_the_formulas(case: Case, dtype: torch.dtype, check_results) -> None:
    want = FORMULAS[case.op._schema.name](*case.build(dtype, CPU))  # type: ignore[attr-defined]
    for fn in (case.op, case.reference):
        check_results(case, results(case, fn, case.build(dtype, CPU)), want)


def first_cases() -> dict[str, Case]:
    """The last of each operator."""
    return {c.op._schema.name: c for c in CASES}  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", first_cases().values(), ids=first_cases())
def test_opcheck(case: Case) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(case.op, case.build(torch.float32, CPU), test_utils=tests)


def test_every_code() -> None:
    data = torch.arange(256).to(torch.uint8).view(2, 128)
    scales = torch.tensor([[1.0], [2.0**-20]])
    got = fp8_expand(data, scales, 1, 0, 2, torch.float32)
    assert torch.equal(got.double().nan_to_num(7), (matrix(data, scales, 1)).nan_to_num(7))


def test_the_reference_takes_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(140, 200)
    x = random((3, 200), torch.float32, CPU, 1)
    want = weight.linear(x, None, torch.float32)
    monkeypatch.setattr("squall.kernels.quant.fp8_linear._REFERENCE_WEIGHTS", 7 * 200)
    torch.testing.assert_close(weight.linear(x, None, torch.float32), want)


def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squall.kernels.quant.fp8_linear._SCRATCH_BYTES", 50 * 200 * 4)
    weight = random_fp8(140, 200, 128, CPU, torch.Generator().manual_seed(2))
    x, bias = random((9, 200), torch.float32, CPU, 1), random((140,), torch.float32, CPU, 2)
    (want,) = linear_formula(x, *weight, 128, bias, torch.float32)
    got = fp8_linear.multiply(x, (*weight, 128), bias, torch.float32, {"expand": 1})
    assert relative_error(got, want) <= ERROR_LIMITS[torch.float32]
    stream = random((9, 140), torch.float32, CPU, 3)
    want += stream
    fp8_linear.multiply_add(x, (*weight, 128), bias, stream, {"expand": 1})
    assert relative_error(stream, want) <= ERROR_LIMITS[torch.float32]


# ---- Fp8Weight


def weight_of(n: int, k: int, seed: int = 0) -> Fp8Weight:
    data, scales = random_fp8(n, k, 128, CPU, torch.Generator().manual_seed(seed))
    return Fp8Weight(data, scales, torch.float32)


def dense(weight: Fp8Weight) -> Tensor:
    return matrix(weight.data, weight.scales, weight.height)


@pytest.mark.parametrize(
    ("rows", "height"),
    [
        ((256, 128, 128), 128),
        ((256, 128, 77), 128),  # where the last one ends does not matter
        ((192, 64, 64), 64),
        ((140, 20), 4),
        ((333, 333), 1),
        ((7, 128), 1),
    ],
)
def test_stacks(rows: tuple[int, ...], height: int) -> None:
    parts = [weight_of(n, 200, seed) for seed, n in enumerate(rows)]
    merged = merge(parts)
    assert isinstance(merged, Fp8Weight)
    assert (merged.height, merged.out_features, merged.in_features) == (height, sum(rows), 200)
    assert merged.nbytes == merged.data.numel() + 4 * merged.scales.numel()
    assert torch.equal(dense(merged), torch.cat([dense(part) for part in parts]))
    again = merge([merged, weight_of(128, 200, 9)])
    assert isinstance(again, Fp8Weight)
    assert torch.equal(dense(again)[: sum(rows)], dense(merged))


def test_rows_in_another_order() -> None:
    weight = weight_of(140, 200)
    ids = torch.randperm(140, generator=torch.Generator().manual_seed(3))
    chosen = weight.select(ids)
    assert torch.equal(dense(chosen), dense(weight)[ids])
    assert torch.equal(weight.rows(ids, torch.float32), dense(weight)[ids].float())
    again = chosen.select(ids[:5]).rows(torch.arange(5), torch.float32)
    assert torch.equal(again, dense(weight)[ids][ids[:5]].float())


def test_products() -> None:
    weight = merge([weight_of(140, 200), weight_of(20, 200, 1)])
    assert isinstance(weight, Fp8Weight)
    x, norm, bias = (
        random(s, torch.float32, CPU, i) for i, s in enumerate(((5, 200), (200,), (160,)))
    )
    inputs = weight.data, weight.scales, weight.height
    for got, want in (
        (weight.linear(x, bias, torch.float32), linear_formula(x, *inputs, bias, torch.float32)),
        (
            weight.norm_linear(x, norm, 1e-5, bias, "silu", torch.float32),
            norm_formula(x, norm, 1e-5, *inputs, bias, "silu", None, torch.float32),
        ),
    ):
        assert relative_error(got, want[0]) <= ERROR_LIMITS[torch.float32]
    stream = random((5, 160), torch.float32, CPU, 4)
    want = add_formula(x, *inputs, bias, stream)
    weight.linear_add(x, bias, stream)
    assert relative_error(stream, want[0]) <= ERROR_LIMITS[torch.float32]


def test_beside_a_dense_weight() -> None:
    weight, other = weight_of(8, 64), DenseWeight(random((4, 64), torch.float32, CPU, 5))
    stack = merge([weight, other])
    assert isinstance(stack, Stack)
    x = random((3, 64), torch.float32, CPU, 6)
    want = x.double() @ torch.cat((dense(weight), other.data.double())).t()
    assert relative_error(stack.linear(x, None, torch.float32), want) <= 1e-5


def test_what_is_no_weight_is_refused() -> None:
    data, scales = random_fp8(130, 200, 128, CPU)
    for wrong in (
        (data.view(torch.float8_e4m3fn), scales, torch.float32),
        (data, scales[:1], torch.float32),
        (data, scales.half(), torch.float32),
        (data, scales, torch.float32, 3),
        (data.t(), scales, torch.float32),
    ):
        with pytest.raises(AssertionError):
            Fp8Weight(*wrong)


# ---- launches


Variant = tuple[str, tuple[int, int, int], int, Config]  # kind, (M, features, K), height, config


def _gemv(rows: int, warps: int) -> Config:
    return {"gemv": 1, "rows": rows, "warps": warps, "programs": 1}


def _skinny(n: int, split: int, warps: int, stages: int) -> Config:
    return {"skinny": 1, "block_n": n, "split": split, "warps": warps, "stages": stages}


def variants() -> Iterator[Variant]:
    yield "plain", (1, 9, 512), 128, _gemv(2, 1)
    yield "plain", (1, 300, 1040), 4, _gemv(1, 2)  # programs with two tiles and with three
    yield "add", (1, 12, 2048), 128, _gemv(8, 4)
    yield "silu", (1, 540, 1024), 64, _gemv(4, 2)
    yield "gelu_tanh", (1, 5, 48), 1, _gemv(2, 4)
    yield "plain", (5, 33, 256), 128, _skinny(32, 1, 4, 5)
    yield "add", (16, 130, 640), 2, _skinny(64, 2, 4, 4)
    yield "silu", (33, 40, 200), 8, _skinny(64, 7, 4, 6)  # parts without a step
    yield "gelu_tanh", (65, 70, 640), 128, _skinny(128, 4, 8, 3)
    yield "plain", (200, 96, 250), 128, _skinny(128, 3, 8, 3)


def run(variant: Variant, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The result, and what it should be (float64, on the CPU)."""
    kind, (m, n, k), height, config = variant
    glu = kind in ("silu", "gelu_tanh")
    normed, add = glu and "gemv" in config, kind == "add"
    data, scales = random_fp8(n * (1 + glu), k, height, CPU, torch.Generator().manual_seed(1))
    bias = random((data.shape[0],), dtype, CPU, 2)
    x = random((m, k + 8), torch.float32 if normed else dtype, CPU, 3)[:, :k]
    norm = random((k,), torch.float32, CPU, 4) if normed else None
    out = random((m, n), torch.float32, CPU, 5) if add else torch.full((m, n), torch.nan)
    y = x.double()
    if norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    y = gated(y @ matrix(data, scales, height).t() + bias.double(), kind if glu else "none")
    if add:
        y = y + out.double()
    x, data, scales, bias, out = (t.to(device) for t in (x, data, scales, bias, out))
    epilogue = Epilogue(out, bias, kind if glu else "none", add)
    if "gemv" in config:
        norm = None if norm is None else norm.to(device)
        fp8_gemv.gemv(x, (data, scales, height), epilogue, config, norm, 1e-5)
    else:
        fp8_skinny.skinny(x, (data, scales, height), epilogue, config)
    return out, y


def check(variant: Variant, dtype: torch.dtype, device: torch.device) -> Tensor:
    got, want = run(variant, dtype, device)
    error = relative_error(got, want)
    assert error <= ERROR_LIMITS[torch.float32], f"{variant}, {dtype}: error {error:.2e}"
    return got


def interpret() -> None:
    for variant in variants():
        for dtype in (torch.float16, torch.bfloat16):
            if dtype == torch.float16 or "gemv" in variant[-1]:
                check(variant, dtype, CPU)
                print(variant, dtype)


def compile_for(capability: int) -> None:
    """Print the shared memory of every variant, compiled for one chip, with dependent launch where
    the chip has it."""
    from aot_compile import OfflineDriver  # beside this file, which runs as a script here
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(OfflineDriver(capability))
    hopper = capability >= 90
    for module in (fp8_gemv, fp8_skinny):
        module.dependent_launch = lambda device: {"launch_pdl": True} if hopper else {}
    launch = JITFunction.run
    kernels = []

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for variant, dtype in product(variants(), (torch.float16, torch.bfloat16)):
        run(variant, dtype, CPU)
        assert len(kernels[-1].asm["cubin"]) > 0
        assert ("griddepcontrol.wait" in kernels[-1].asm["ptx"]) == hopper
        print(kernels[-1].metadata.shared, variant, dtype)


def _script(*arguments: str, **environment: str) -> list[str]:
    apart = ("TRITON_INTERPRET", "PYTHONSAFEPATH")
    env = {k: v for k, v in os.environ.items() if k not in apart} | environment
    command = [sys.executable, str(Path(__file__)), *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_variants_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert len(_script("interpret", TRITON_INTERPRET="1")) == 15


@pytest.mark.parametrize(("chip", "limit"), [(80, 163), (90, 227)])
def test_variants_compile_and_fit(chip: int, limit: int) -> None:
    pytest.importorskip("triton")
    lines = _script("compile", str(chip))
    assert len(lines) == 20
    for line in lines:
        assert int(line.split()[0]) <= limit * 1024, line


def test_rows_decide_how_to_multiply() -> None:
    data, f16 = torch.empty(64, 512, dtype=torch.uint8), torch.float16
    for rows, way in ((1, "gemv"), (2, "skinny"), (64, "skinny"), (65, "expand")):
        assert way in fp8_linear._choose(rows, data, f16), rows
    assert "skinny" in fp8_linear._choose(1, data[:, :500], f16)  # no whole chunks
    assert "expand" in fp8_linear._choose(1, data, torch.float32)


def test_launch_parameters_are_legal() -> None:
    problems = list(fp8_tunables.TUNABLE.problems([(6144, 4096), (28672, 4096), (7168, 18432)]))
    assert len({problem.key for problem in problems}) == len(problems) == 21
    for problem in problems:
        assert problem.candidates[-1] == {"expand": 1}
        assert 2 <= len(problem.candidates) <= 24
        for config in problem.candidates:
            if "skinny" in config:
                assert 1 <= config["split"] <= 16
                bucket = int(problem.key.rpartition("m")[2])
                stage = 128 * (config["block_n"] + 2 * bucket)
                assert config["stages"] * stage <= 200 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", list(variants()), ids=str)
def test_variants_on_a_gpu(variant: Variant, dtype: torch.dtype) -> None:
    """The same bits when run twice, and the counters left at zero."""
    device = torch.device("cuda")
    assert torch.equal(check(variant, dtype, device), check(variant, dtype, device))
    assert not counters(device).any()


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret()
    else:
        compile_for(int(sys.argv[2]))
