"""The dense linear kernels with launch parameters that no rule picks here, and the rules.

Case tables run a kernel as the rules launch it. This file runs the rest: tiles of all sizes, more
parts of K than there are steps, programmatic dependent launch. A process can interpret kernels,
compile them for another chip, or run them, so the first two have one of their own each:
``python test_linear.py interpret`` and ``python test_linear.py compile 90``.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels import linear as dense
from squall.kernels import linear_gemm, linear_gemv, linear_skinny
from squall.kernels.cases import ERROR_LIMITS, random, relative_error
from squall.kernels.counters import counters
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.tuning import Config, row_bucket

CPU = torch.device("cpu")
EPS = 1e-5


@dataclass(frozen=True)
class Variant:
    """One launch: ``kind`` is "plain", "add", "norm", "silu" or "gelu_tanh"."""

    kind: str
    rows: int
    features: int
    columns: int
    config: Config
    gap: int = 8  # elements between the rows of x

    def __str__(self) -> str:
        parameters = "-".join(f"{k}{v}" for k, v in self.config.items())
        return f"{self.kind}-{self.rows}x{self.features}x{self.columns}-{parameters}"

    def run(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The result, and what it should be (float64, on the CPU)."""
        m, n, k = self.rows, self.features, self.columns
        gated = self.kind in ("silu", "gelu_tanh")
        normed = "gemv" in self.config and self.kind != "plain" and self.kind != "add"
        add = self.kind == "add"
        w = (random((n * (1 + gated), k), torch.float32, CPU, 1) / k**0.5).to(dtype)
        bias = random((w.shape[0],), dtype, CPU, 2)
        x = random((m, k + self.gap), torch.float32 if normed else dtype, CPU, 3)[:, :k]
        norm = random((k,), torch.float32, CPU, 4) if normed else None
        out = random((m, n), torch.float32, CPU, 5) if add else torch.full((m, n), float("nan"))
        y = x.double()
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
        y = y @ w.double().t() + bias.double()
        if gated:
            z, up = y.chunk(2, -1)
            y = (F.silu(z) if self.kind == "silu" else F.gelu(z, approximate="tanh")) * up
        if add:
            y += out.double()
        x, w, bias, out = (t.to(device) for t in (x, w, bias, out))
        epilogue = Epilogue(out, bias, self.kind if gated else "none", add)
        if "gemv" in self.config:
            norm = None if norm is None else norm.to(device)
            linear_gemv.gemv(x, w, epilogue, self.config, norm, EPS)
        elif "gemm" in self.config:
            linear_gemm.gemm(x, w, epilogue, self.config)
        else:
            linear_skinny.skinny(x, w, epilogue, self.config)
        return out, y


def _gemv(rows: int, warps: int, pdl: int = 0) -> Config:
    return {"gemv": 1, "rows": rows, "warps": warps, "programs": 1, "pdl": pdl}


def _skinny(n: int, k: int, split: int, warps: int, stages: int, pdl: int = 0) -> Config:
    config = {"skinny": 1, "block_n": n, "block_k": k, "split": split}
    return {**config, "warps": warps, "stages": stages, "pdl": pdl}


def _gemm(
    tile: tuple[int, int, int], warps: int, stages: int, split: int = 1, lag: int = 0
) -> Config:
    sizes = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
    return {"gemm": 1, **sizes, "split": split, "lag": lag, "warps": warps, "stages": stages}


def variants() -> Iterator[Variant]:
    yield Variant("plain", 1, 9, 512, _gemv(2, 1))
    yield Variant("plain", 1, 300, 1032, _gemv(1, 4))  # programs with two tiles and with three
    yield Variant("add", 1, 12, 2048, _gemv(4, 8))
    yield Variant("norm", 1, 540, 4096, _gemv(2, 4))
    yield Variant("silu", 1, 10, 2048, _gemv(4, 4))
    yield Variant("gelu_tanh", 1, 5, 1000, _gemv(2, 2))
    yield Variant("plain", 5, 33, 256, _skinny(32, 128, 1, 4, 5))
    yield Variant("add", 16, 130, 512, _skinny(64, 128, 2, 4, 4))
    yield Variant("silu", 33, 40, 200, _skinny(64, 64, 7, 4, 6))  # parts without a step
    yield Variant("gelu_tanh", 65, 70, 640, _skinny(128, 64, 4, 8, 3))
    yield Variant("plain", 200, 96, 256, _skinny(128, 64, 3, 8, 3))
    yield Variant("plain", 70, 136, 200, _gemm((64, 64, 64), 4, 3))
    yield Variant("plain", 5, 72, 520, _gemm((64, 64, 64), 4, 3, 3, 2))
    yield Variant("plain", 65, 8, 128, _gemm((64, 64, 64), 4, 3), gap=3)  # no descriptor's rows
    yield Variant("add", 130, 72, 520, _gemm((64, 64, 64), 4, 3, 4, 1))
    yield Variant("add", 1, 64, 128, _gemm((64, 64, 64), 4, 3, 5, 2))  # parts without a step
    yield Variant("silu", 100, 72, 328, _gemm((64, 64, 64), 4, 3))
    yield Variant("gelu_tanh", 64, 40, 64, _gemm((64, 64, 64), 4, 3))


def dependent_variants() -> Iterator[Variant]:
    """With programmatic dependent launch, or with tiles for Hopper: sm_90 and newer."""
    yield Variant("plain", 1, 40, 2048, _gemv(4, 8, pdl=1))
    yield Variant("silu", 1, 301, 4096, _gemv(2, 4, pdl=1))
    yield Variant("add", 8, 130, 1000, _skinny(64, 64, 3, 4, 5, pdl=2))
    yield Variant("silu", 64, 70, 640, _skinny(64, 128, 1, 4, 4, pdl=1))
    yield Variant("plain", 256, 264, 520, _gemm((256, 128, 64), 8, 4, 2, 2))
    yield Variant("plain", 300, 264, 520, _gemm((128, 256, 64), 8, 4))
    yield Variant("add", 256, 264, 2048, _gemm((256, 128, 64), 8, 4, 4, 3))
    yield Variant("add", 128, 264, 520, _gemm((128, 128, 128), 8, 3, 2))
    yield Variant("silu", 200, 264, 520, _gemm((256, 128, 64), 8, 4))
    yield Variant("silu", 200, 264, 520, _gemm((128, 256, 64), 8, 4))
    yield Variant("gelu_tanh", 64, 264, 520, _gemm((64, 256, 64), 4, 4))


def check(variant: Variant, dtype: torch.dtype, device: torch.device) -> Tensor:
    got, want = variant.run(dtype, device)
    error = relative_error(got, want)
    assert error <= ERROR_LIMITS[torch.float32], f"{variant}, {dtype}: error {error:.2e}"
    return got


def interpret() -> None:
    for variant in variants():
        for dtype in (torch.float16, torch.bfloat16):
            if dtype == torch.float16 or "gemv" in variant.config:
                check(variant, dtype, CPU)
                print(f"{variant} {dtype}")


def compile_for(capability: int) -> None:
    """Print the shared memory of every variant, compiled for one chip."""
    from aot_compile import OfflineDriver  # beside this file, which runs as a script here
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(OfflineDriver(capability))
    hopper = capability >= 90
    linear_gemm.dependent_launch = lambda device: {"launch_pdl": True} if hopper else {}
    launch = JITFunction.run
    kernels = []

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for variant in (*variants(), *(dependent_variants() if hopper else ())):
        variant.run(torch.bfloat16, CPU)
        assert len(kernels[-1].asm["cubin"]) > 0
        dependent = variant.config.get("pdl", hopper)
        assert ("griddepcontrol.wait" in kernels[-1].asm["ptx"]) == bool(dependent)
        print(f"{kernels[-1].metadata.shared} {variant}")


def _script(*arguments: str, **environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, str(Path(__file__)), *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_variants_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert len(_script("interpret", TRITON_INTERPRET="1")) == 24


@pytest.mark.parametrize(("chip", "limit", "count"), [(80, 163, 18), (90, 227, 29)])
def test_variants_compile_and_fit(chip: int, limit: int, count: int) -> None:
    pytest.importorskip("triton")
    lines = _script("compile", str(chip))
    assert len(lines) == count
    for line in lines:
        assert int(line.split()[0]) <= limit * 1024, line


def test_rows_decide_how_to_multiply() -> None:
    half, single = torch.empty(64, 512, dtype=torch.bfloat16), torch.empty(64, 512)
    for rows, way in ((1, "gemv"), (2, "skinny"), (64, "skinny"), (65, "cublas")):
        assert way in dense._choose(rows, half, gated=True), rows
    assert "skinny" in dense._choose(1, half[:, :500], gated=True)  # rows of no whole vectors
    assert "cublas" in dense._choose(1, single, gated=False)


def test_a_table_decides_first(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "n64-k512-m256": _skinny(64, 64, 1, 4, 4),
        "n64-k512-m128": _gemm((128, 128, 64), 8, 3, split=2),
        "n64-k512-m1": {"cublas": 1},
    }
    monkeypatch.setattr(dense, "tuned", lambda kernel, key, device: table.get(key))
    w = torch.empty(64, 512, dtype=torch.bfloat16)
    assert dense._choose(129, w, gated=False) == table["n64-k512-m256"]
    assert dense._choose(65, w, gated=False) == table["n64-k512-m128"]
    assert "cublas" in dense._choose(65, w, gated=True)  # parts of gate and up cannot be added
    unaligned = torch.empty(64 * 513, dtype=torch.bfloat16).as_strided((64, 512), (513, 1))
    assert "cublas" in dense._choose(65, unaligned, gated=False)
    assert "cublas" in dense._choose(1, w, gated=False)
    assert "skinny" in dense._choose(32, w, gated=False)
    assert "cublas" in dense._choose(257, w, gated=False)
    assert "cublas" in dense._choose(1, w.float(), gated=False)


@pytest.mark.parametrize("k", [32, 300, 2048, 14336])
@pytest.mark.parametrize("features", [1, 576, 4096, 128256])
def test_rules_fill_the_gpu_without_waste(features: int, k: int) -> None:
    for gated in (False, True):
        config = linear_gemv.rule(k)
        assert config["warps"] == 1 or config["warps"] * 256 <= 2 * k
        config = linear_skinny.rule(features, k, gated, CPU)
        assert config["split"] == 1 or k // config["split"] >= 512


def test_parts_of_a_tile_cover_k_once() -> None:
    """By the formula that the kernel shares with it, for more lag than there are steps too."""
    first_step = linear_gemm._first_step.fn
    for steps, split, lag in product((1, 5, 64, 224), (1, 2, 4, 8), (0, 1, 3, 7)):
        bounds = [first_step(part, steps, split, lag) for part in range(split + 1)]
        assert bounds[0] == 0
        assert bounds[-1] == steps
        assert bounds == sorted(bounds)


def test_tiles_for_hopper_are_legal_and_fill_it() -> None:
    for bucket, (n, k), gated in product(
        (32, 64, 128, 256),
        ((6144, 4096), (4096, 14336), (28672, 4096), (128256, 2048), (100, 64)),
        (False, True),
    ):
        found = list(linear_gemm.candidates(bucket, n, k, gated))
        assert bool(found) == (bucket >= 64 and n % 8 == 0)
        assert len(found) <= 12
        for config in found:
            m, rows, columns = config["block_m"], config["block_n"], config["block_k"]
            assert (m + rows) * columns * 2 * config["stages"] <= 224 * 1024
            assert m * rows <= 128 * 32 * config["warps"]  # registers of the sums
            assert not gated or config["split"] == 1
            programs = -(-bucket // m) * -(-n * (1 + gated) // rows) * config["split"]
            assert config["split"] == 1 or 88 <= programs <= 264, config
            assert k >= config["split"] * 8 * columns or config["split"] == 1


def test_every_problem_has_few_candidates_and_the_library_among_them() -> None:
    problems = list(dense.TUNABLE.problems([(6144, 4096), (28672, 4096), (128256, 2048)]))
    assert len({p.key for p in problems}) == len(problems) == 21
    for problem in problems:
        assert 2 <= len(problem.candidates) <= 26, problem.key
        assert problem.candidates[-1] == {"cublas": 1}
        assert len({tuple(c.items()) for c in problem.candidates}) == len(problem.candidates)


def test_a_tuning_problem_runs() -> None:
    problem = next(iter(dense.TUNABLE.problems([(64, 4096)])))
    problem.build(CPU)({"cublas": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded(dtype: torch.dtype) -> None:
    x, w = random((3, 64), dtype, CPU, 1), random((50, 64), dtype, CPU, 2)
    got = dense.linear(x, w, None, torch.float32)
    assert got.dtype == torch.float32
    assert relative_error(got, x.double() @ w.double().t()) <= ERROR_LIMITS[torch.float32]


ON_GPU = [
    pytest.param(v, dtype, id=f"{v}-{str(dtype).removeprefix('torch.')}")
    for v in (*variants(), *dependent_variants())
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "dtype"), ON_GPU)
def test_variants_on_a_gpu(variant: Variant, dtype: torch.dtype) -> None:
    if variant in dependent_variants() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    device = torch.device("cuda")
    first = check(variant, dtype, device)
    assert not counters(first.device).any()
    assert torch.equal(first, check(variant, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["silu", "add", "plain"])
@pytest.mark.parametrize("rows", [63, 128, 255])
def test_every_tile_for_hopper_gives_the_product(rows: int, kind: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    bucket, k = row_bucket(rows), 4096
    for config in linear_gemm.candidates(bucket, 520, k, kind == "silu"):
        check(Variant(kind, rows, 520, k, config), torch.bfloat16, torch.device("cuda"))


def _chains() -> Iterator[object]:
    """Rows, and how the way up and the way down are launched."""
    for pdl in (0, 1):
        for rows in (1, 3, 8, 40):
            config = _gemv(4, 4, pdl) if rows == 1 else _skinny(64, 64, 4, 4, 5, pdl)
            yield pytest.param(rows, config, config, id=f"{rows}-pdl{pdl}")
    for rows in (64, 128, 256):
        # With 256 rows the way down has more programs, which take turns, than run at a time.
        up, down = _gemm((64, 128, 64), 4, 4), _gemm((64, 64, 64), 4, 5, 5, 2)
        yield pytest.param(rows, up, down, id=f"{rows}-gemm")


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "way_up", "way_down"), [*_chains()])
def test_a_captured_chain_repeats_bit_by_bit(rows: int, way_up: Config, way_down: Config) -> None:
    """Twelve layers whose kernels feed each other, eagerly and as one graph: with dependent launch
    a kernel that reads too early shows here."""
    if way_up.get("pdl") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    device, dtype, hidden, inner = torch.device("cuda"), torch.bfloat16, 1024, 2816
    up = random((2 * inner, hidden), torch.float32, CPU, 1).to(device, dtype) / hidden**0.5
    down = random((hidden, inner), torch.float32, CPU, 2).to(device, dtype) / inner**0.5
    norm = torch.ones(hidden, device=device)
    start = random((rows, hidden), torch.float32, device, 3)
    stream = start.clone()

    def chain() -> None:
        for _ in range(12):
            x = dense._norm_linear(stream, norm, EPS, up, None, "silu", dtype, way_up)
            dense._linear_add(x, down, None, stream, way_down)

    chain()
    want = stream.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(5):
        stream.copy_(start)
        graph.replay()
        assert torch.equal(stream, want)
    expected = start.cpu()
    for _ in range(12):
        x = dense.norm_linear_reference(expected, norm.cpu(), EPS, up.cpu(), None, "silu", dtype)
        dense.linear_add_reference(x, down.cpu(), None, expected)
    assert relative_error(want, expected) <= ERROR_LIMITS[dtype]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret()
    else:
        compile_for(int(sys.argv[2]))
