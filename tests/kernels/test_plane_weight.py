"""Quantised weights as the models use them, on the CPU references, against float64."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import ERROR_LIMITS, random, relative_error
from squall.kernels.quant import gemm, gemv, plane_weight
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.plane_weight import PlaneStack, PlaneWeight
from squall.kernels.quant.planes import dequantize, random_planes

CPU = torch.device("cpu")
FORMATS = {e.name: e for e in gguf_formats().values() if e.unpack is not None}
ROWS = (0, 1, 8, 9, gemm.MAX_ROWS, gemm.MAX_ROWS + 1)


def weight_of(
    name: str, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PlaneWeight:
    generator = torch.Generator().manual_seed(seed)
    return PlaneWeight(random_planes(FORMATS[name], n, k, CPU, generator), dtype)


def stack_of(dtype: torch.dtype = torch.float32) -> PlaneStack:
    parts = weight_of("Q4_K", 24, 512, 1, dtype), weight_of("Q6_K", 8, 512, 2, dtype)
    return PlaneStack(parts)


def matrix(weight: PlaneWeight | PlaneStack) -> Tensor:
    parts = weight.parts if isinstance(weight, PlaneStack) else (weight,)
    return torch.cat([dequantize(part.planes) for part in parts]).double()


def normed(stream: Tensor, norm: Tensor) -> Tensor:
    x = stream.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``dtype`` is the coarsest of the activations, the weights in use and the result; what is
    coarser than float32 is 16-bit blocks of activations."""
    assert relative_error(got, want) <= max(ERROR_LIMITS[dtype], 1e-4)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators that ran, in order."""
    seen: list[str] = []

    def watch(module: ModuleType, name: str) -> None:
        fn = getattr(module, name)

        def run(*args: object) -> object:
            seen.append(name)
            return fn(*args)

        monkeypatch.setattr(module, name, run)

    for name in ("plane_gemv", "plane_gemv_pair", "plane_gemv_add"):
        watch(gemv, name)
    for name in ("plane_gemm", "plane_gemm_pair", "plane_gemm_add"):
        watch(gemm, name)
    for name in ("rms_norm", "expand_planes"):
        watch(plane_weight, name)
    return seen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_linear(name: str, rows: int) -> None:
    k = 544 if FORMATS[name].block_size == 32 else 512
    weight = weight_of(name, 24, k)
    bias = random((24,), torch.float32, CPU, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random((rows, k + 8), dtype, CPU, 2)[:, 8:]
        want = x.double() @ matrix(weight).t()
        for out in {dtype, torch.float32}:
            got = weight.linear(x, None, out)
            assert got.dtype == out
            assert got.shape == (rows, 24)
            assert_close(got, want, dtype)
            assert_close(weight.linear(x, bias, out), want + bias, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize("stacked", [False, True])
def test_norm_linear(activation: str, rows: int, stacked: bool) -> None:
    def weight(dtype: torch.dtype) -> PlaneWeight | PlaneStack:
        return stack_of(dtype) if stacked else weight_of("Q5_K", 32, 512, dtype=dtype)

    single, half = torch.float32, torch.bfloat16
    stream, norm = random((rows, 512), torch.float32, CPU, 3), random((512,), torch.float32, CPU, 4)
    for bias in (None, random((32,), torch.float32, CPU, 5)):
        y = normed(stream, norm) @ matrix(weight(single)).t()
        y = y if bias is None else y + bias
        if activation != "none":
            gate, up = y.tensor_split(2, -1)
            y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
        for own, dtype in ((single, single), (half, half), (half, single)):
            got = weight(own).norm_linear(stream, norm, 1e-5, bias, activation, dtype)
            assert got.dtype == dtype
            assert got.shape == (rows, 32 if activation == "none" else 16)
            assert_close(got, y, torch.bfloat16 if own == half else torch.float16)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("stacked", [False, True])
def test_linear_add(rows: int, stacked: bool) -> None:
    weight = stack_of() if stacked else weight_of("Q8_0", 32, 96)
    k = weight.in_features
    for dtype in (torch.float32, torch.float16):
        x, bias = random((rows, k), dtype, CPU, 6), random((32,), torch.float32, CPU, 7)
        wide = random((rows, 40), torch.float32, CPU, 8)
        stream, beside = wide[:, :32], wide[:, 32:].clone()
        want = stream + x.double() @ matrix(weight).t() + bias
        weight.linear_add(x, bias, stream)
        assert_close(stream, want, dtype)
        assert torch.equal(wide[:, 32:], beside)


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name: str) -> None:
    weight = weight_of(name, 24, 512)
    for ids in (torch.tensor([3, 0, 23, 3]), torch.tensor([], dtype=torch.int32)):
        got = weight.rows(ids, torch.float16)
        assert torch.equal(got, dequantize(weight.planes)[ids.long()].half())


def test_selected_rows() -> None:
    ids = torch.tensor([5, 0, 23, 5])
    for name in FORMATS:
        weight = weight_of(name, 24, 512)
        assert torch.equal(dequantize(weight.select(ids).planes), dequantize(weight.planes)[ids])


def test_sizes_and_a_stack_is_no_embedding() -> None:
    stack = stack_of()
    with pytest.raises(TypeError):
        stack.select(torch.tensor([0]))
    assert (stack.out_features, stack.in_features) == (32, 512)
    assert stack.nbytes == sum(part.nbytes for part in stack.parts)
    with pytest.raises(TypeError):
        stack.rows(torch.tensor([1]), torch.float32)


def test_a_row_does_not_depend_on_its_company() -> None:
    weight, x = weight_of("Q4_K", 24, 512), random((8, 512), torch.float32, CPU, 9)
    together = weight.linear(x, None, torch.float32)
    for i in range(8):
        assert_close(weight.linear(x[i : i + 1], None, torch.float32), together[i : i + 1], x.dtype)


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.bfloat16, ["plane_gemv_pair"]),
        (8, torch.float32, ["plane_gemv_pair"]),
        (2, torch.bfloat16, ["rms_norm", "plane_gemm_pair"]),
        (9, torch.float32, ["rms_norm", "expand_planes", "expand_planes"]),
        (gemm.MAX_ROWS + 1, torch.float16, ["rms_norm", "expand_planes", "expand_planes"]),
    ],
)
def test_a_stack_makes_its_activations_once(
    rows: int, dtype: torch.dtype, expected: list[str], ways: list[str]
) -> None:
    stream, norm = random((rows, 512), torch.float32, CPU, 10), torch.ones(512)
    stack_of(dtype).norm_linear(stream, norm, 1e-5, None, "none", dtype)
    assert ways == expected


def test_float32_logits_do_not_need_float32_activations(ways: list[str]) -> None:
    stream, norm = random((9, 512), torch.float32, CPU, 10), torch.ones(512)
    weight = weight_of("Q6_K", 24, 512, dtype=torch.float16)
    y = weight.norm_linear(stream, norm, 1e-5, None, "none", torch.float32)
    assert (ways, y.dtype) == (["rms_norm", "plane_gemm"], torch.float32)


@pytest.mark.parametrize("found", ["gemv", "gemm", "blas", None])
def test_the_table_chooses_among_what_is_possible(
    found: str | None, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def tuned(kernel: str, key: str, device: torch.device) -> dict[str, int] | None:
        asked.append((kernel, key))
        return None if found is None else {found: 1}

    monkeypatch.setattr(plane_weight, "tuned", tuned)
    weight = weight_of("Q4_K", 24, 512)
    for rows, dtype in ((6, torch.bfloat16), (6, torch.float32), (1, torch.bfloat16)):
        ways.clear()
        weight.linear(random((rows, 512), dtype, CPU, 11), None, dtype)
        possible = {"gemv": "plane_gemv", "gemm": "plane_gemm", "blas": "expand_planes"}
        if rows > 1 and dtype != torch.float32:
            del possible["gemv"]
        if dtype == torch.float32:
            del possible["gemm"]
        assert ways[-1] == possible.get(found or "", next(iter(possible.values())))
    assert asked[0] == ("plane_crossover", "q4_k-n24-k512-m8")


def test_large_matrices_are_expanded_in_parts(
    ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane_weight, "_SCRATCH_BYTES", 10 * 512 * 4)
    weight, bias = weight_of("Q3_K", 25, 512), random((25,), torch.float32, CPU, 12)
    x = random((9, 512), torch.float32, CPU, 13)
    want = x.double() @ matrix(weight).t() + bias
    assert_close(weight.linear(x, bias, torch.float32), want, x.dtype)
    assert ways == ["expand_planes"] * 3
    stream = torch.zeros(9, 25)
    weight.linear_add(x, bias, stream)
    assert_close(stream, want, x.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_parts_side_by_side_are_the_same_in_a_chain_of_launches(rows: int) -> None:
    """Each step's products read what the step before has written, and write what it has read."""
    device, k = torch.device("cuda"), 1024
    generator = torch.Generator(device).manual_seed(1)
    stacks = [
        PlaneStack(
            tuple(
                PlaneWeight(random_planes(FORMATS[name], n, k, device, generator), torch.float16)
                for name, n in (("Q4_K", 768), ("Q6_K", 256))
            )
        )
        for _ in range(8)
    ]
    norm = torch.ones(k, device=device)

    def chain(stream: Tensor, wait: bool) -> Tensor:
        for stack in stacks * 3:
            y = stack.norm_linear(stream, norm, 1e-5, None, "none", torch.float16)
            if wait:
                torch.cuda.synchronize()
            stack.linear_add(y, None, stream)
            if wait:
                torch.cuda.synchronize()
        return stream

    start = random((rows, k), torch.float32, device, 12)
    want = chain(start.clone(), wait=True)
    graph, stream = torch.cuda.CUDAGraph(), start.clone()
    with torch.cuda.graph(graph):
        chain(stream, wait=False)
    for _ in range(20):
        stream.copy_(start)
        graph.replay()
        assert torch.equal(stream, want)
