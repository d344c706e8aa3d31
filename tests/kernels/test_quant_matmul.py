"""Products with quantised weights: the torch reference and the native CPU library, both against
float64 on the dequantised weights."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from squall.kernels.quant import cpu_native
from squall.kernels.quant.base import QuantFormat, gguf_formats
from squall.kernels.quant.matmul import (
    dequantize_rows,
    dequantize_rows_reference,
    quant_matmul,
    quant_matmul_add,
    quant_matmul_add_reference,
    quant_matmul_reference,
    quant_norm_matmul,
    quant_norm_matmul_reference,
)

QUANTISED = {f.name: f for f in gguf_formats().values() if f.unpack is not None}
# Where a block keeps its float16 numbers.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
# Largest |y - y64| over |x| |w| / sqrt(K), the size of a product of random directions. float32:
# rounding to 16 bits the activations of a group of 32 with one far larger than the rest costs
# sqrt(32) / (sqrt(12) 32767) = 5e-5 in the root mean square; this is eight times as much. The
# others: one rounding of a result that a common sign of the terms makes larger than that size.
LIMITS = {torch.float32: 4e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NORMAL_RMS = 2.5e-5  # of float32 errors with normal activations: 2.3 sigma / (sqrt(12) 32767)
ROWS = (1, 2, 3, 7, 8, 9, 33, 64, 130)
COLUMNS = (1, 5, 63, 257)
BLOCK_COUNTS = {32: (1, 3, 33), 256: (1, 3)}  # K below, at and beyond one pass of the C code


@dataclass(frozen=True)
class Implementation:
    matmul: Callable[[Tensor, Tensor, int], Tensor]
    rows: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
    norm_matmul: Callable[[Tensor, Tensor, float, Tensor, int, str, torch.dtype], Tensor]
    matmul_add: Callable[[Tensor, Tensor, int, Tensor], None]


REFERENCE = Implementation(
    quant_matmul_reference,
    dequantize_rows_reference,
    quant_norm_matmul_reference,
    quant_matmul_add_reference,
)
OPERATORS = Implementation(quant_matmul, dequantize_rows, quant_norm_matmul, quant_matmul_add)


def need_native() -> None:
    reason = cpu_native.enable()
    if reason is not None:
        pytest.skip(f"no native library: {reason}")


@pytest.fixture(params=["reference", "native"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "reference":  # what the operators run where the library is not enabled
        return REFERENCE
    need_native()
    return OPERATORS


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(entry: QuantFormat, n: int, blocks: int, seed: int = 0) -> Tensor:
    """Random quants and sub-scales under scales from -1 to 1: uint8 ``[n, row_bytes]``."""
    source = generator(seed)
    shape = (n, blocks, entry.block_bytes)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    if entry.name == "MXFP4":
        raw[:, :, 0] = torch.randint(123, 132, (n, blocks), generator=source)
    for offset in HALVES.get(entry.name, ()):
        scales = (torch.rand(n, blocks, 1, generator=source) * 2 - 1).half()
        raw[:, :, offset : offset + 2] = scales.view(torch.uint8)
    return raw.view(n, -1)


def random_rows(m: int, k: int, seed: int = 0) -> Tensor:
    """Normal rows of sizes from 1e-3 to 1e3, with one entry in a hundred ten times larger."""
    source = generator(seed)
    x = torch.randn(m, k, generator=source)
    x[torch.rand(m, k, generator=source) < 0.01] *= 10
    return x * 10 ** (torch.rand(m, 1, generator=source) * 6 - 3)


@dataclass(frozen=True)
class Expected:
    """Products in float64, and the size they are measured by."""

    y: Tensor
    size: Tensor

    @staticmethod
    def of(entry: QuantFormat, x: Tensor, raw: Tensor) -> "Expected":
        weights = entry.dequantize(raw).double()
        lengths = torch.outer(x.double().norm(dim=1), weights.norm(dim=1))
        return Expected(x.double() @ weights.t(), lengths / x.shape[1] ** 0.5)

    def check(self, y: Tensor, name: str) -> None:
        """``y`` against the first rows and the last columns."""
        m, n = y.shape
        error = ((y.double() - self.y[:m, -n:]).abs() / self.size[:m, -n:]).max().item()
        assert error <= LIMITS[y.dtype], f"{name}, {m} rows, {n} columns: {error:.1e}"


def check(entry: QuantFormat, x: Tensor, raw: Tensor, y: Tensor) -> None:
    assert y.dtype == x.dtype
    assert y.shape == (len(x), len(raw))
    Expected.of(entry, x, raw).check(y, f"{entry.name} {x.dtype} K={x.shape[1]}")


@pytest.mark.parametrize("name", QUANTISED)
def test_products(implementation: Implementation, name: str) -> None:
    entry = QUANTISED[name]
    native = implementation.matmul is quant_matmul
    for blocks in BLOCK_COUNTS[entry.block_size]:
        raw = random_weights(entry, max(COLUMNS), blocks)
        x = random_rows(max(ROWS), blocks * entry.block_size)
        expected = Expected.of(entry, x, raw)
        for n, m in itertools.product(COLUMNS, ROWS) if native else ((63, 1), (257, 130)):
            y = implementation.matmul(x[:m], raw[-n:], entry.ggml_type)
            assert y.shape == (m, n)
            expected.check(y, f"{name} K={x.shape[1]}")


@pytest.mark.parametrize("name", QUANTISED)
def test_normal_activations(implementation: Implementation, name: str) -> None:
    entry = QUANTISED[name]
    raw = random_weights(entry, 100, 512 // entry.block_size)
    x = torch.randn(50, 512, generator=generator(9))
    expected = Expected.of(entry, x, raw)
    error = (implementation.matmul(x, raw, entry.ggml_type).double() - expected.y) / expected.size
    assert error.square().mean().sqrt().item() <= NORMAL_RMS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTISED)
def test_half_precision(implementation: Implementation, name: str, dtype: torch.dtype) -> None:
    entry = QUANTISED[name]
    raw = random_weights(entry, 37, 3)
    x = torch.randn(9, 3 * entry.block_size, generator=generator(1)).mul(0.1).to(dtype)
    x[0] *= 1e-4  # float16 subnormals
    for m in (1, 9):
        check(entry, x[:m], raw, implementation.matmul(x[:m], raw, entry.ggml_type))


@pytest.mark.parametrize("name", QUANTISED)
def test_layouts(implementation: Implementation, name: str) -> None:
    """Any leading dimensions and strides of x; weights at odd addresses and with long rows."""
    entry = QUANTISED[name]
    n, k = 21, 3 * entry.block_size
    raw, x = random_weights(entry, n, 3), random_rows(6, k)
    expected = implementation.matmul(x, raw, entry.ggml_type)
    check(entry, x, raw, expected)
    layouts = {
        "transposed": x.t().contiguous().t(),
        "every second": torch.stack((x, x), dim=-1).view(6, -1)[:, ::2],
    }
    for layout in layouts.values():
        assert not layout.is_contiguous()
        assert torch.equal(implementation.matmul(layout, raw, entry.ggml_type), expected)
    cube = implementation.matmul(x.view(2, 3, k), raw, entry.ggml_type)
    assert torch.equal(cube, expected.view(2, 3, n))
    assert implementation.matmul(x[0], raw, entry.ggml_type).shape == (n,)
    for offset in (1, 2):
        moved = torch.empty(raw.numel() + offset, dtype=torch.uint8)[offset:].view_as(raw)
        moved.copy_(raw)
        assert moved.data_ptr() % 4 != 0
        assert torch.equal(implementation.matmul(x, moved, entry.ggml_type), expected)
    wide = torch.cat((raw, raw), dim=1)[:, : raw.shape[1]]
    assert wide.stride(0) == 2 * raw.shape[1]
    assert torch.equal(implementation.matmul(x, wide, entry.ggml_type), expected)
    column_major = raw.t().contiguous().t()
    assert torch.equal(implementation.matmul(x, column_major, entry.ggml_type), expected)


@pytest.mark.parametrize("name", QUANTISED)
def test_nothing_to_do(implementation: Implementation, name: str) -> None:
    entry = QUANTISED[name]
    raw = random_weights(entry, 5, 1)
    none = torch.empty(0, entry.block_size)
    assert implementation.matmul(none, raw, entry.ggml_type).shape == (0, 5)
    x = torch.ones(3, entry.block_size)
    assert implementation.matmul(x, raw[:0], entry.ggml_type).shape == (3, 0)
    zeros = implementation.matmul(torch.zeros_like(x), raw, entry.ggml_type)
    assert torch.equal(zeros, torch.zeros(3, 5))
    no_rows = torch.empty(0, dtype=torch.int64)
    got = implementation.rows(raw, no_rows, entry.ggml_type, torch.bfloat16)
    assert got.shape == (0, entry.block_size)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("special", [0x7C00, 0xFC00, 0x7E00], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", HALVES)
def test_bad_rows_stay_apart(implementation: Implementation, name: str, special: int) -> None:
    """A weight row or an activation row that is not finite spoils its own results only."""
    entry = QUANTISED[name]
    raw = random_weights(entry, 20, 3)
    x = random_rows(5, 3 * entry.block_size)
    clean = implementation.matmul(x, raw, entry.ggml_type)
    spoilt = raw.clone()
    for offset in HALVES[name]:
        at = entry.block_bytes + offset
        spoilt[7, at : at + 2] = torch.tensor([special & 255, special >> 8])
    x_spoilt = x.clone()
    x_spoilt[3, -1] = torch.tensor([special], dtype=torch.uint16).view(torch.float16).float().item()
    y = implementation.matmul(x_spoilt, spoilt, entry.ggml_type)
    assert not y[:, 7].isfinite().any()
    assert not y[3].isfinite().any()
    others = [c for c in range(20) if c != 7], [r for r in range(5) if r != 3]
    assert torch.equal(y[others[1]][:, others[0]], clean[others[1]][:, others[0]])


def test_random_bytes(implementation: Implementation) -> None:
    """Blocks that no quantiser would write: what is finite stays right."""
    for name in HALVES:
        entry = QUANTISED[name]
        shape = (200, 2 * entry.block_bytes)
        raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(2))
        x = torch.randn(4, 2 * entry.block_size, generator=generator(3))
        y = implementation.matmul(x, raw, entry.ggml_type)
        finite = entry.dequantize(raw).isfinite().all(dim=1)
        assert 100 < finite.sum() < 200
        check(entry, x, raw[finite], y[:, finite])
        assert not y[:, ~finite].isfinite().any()


def test_every_power_of_mxfp4(implementation: Implementation) -> None:
    """Within float32's range, activations and sums included."""
    entry = QUANTISED["MXFP4"]
    raw = random_weights(entry, 256, 2)
    raw[:, :: entry.block_bytes] = torch.arange(256).clamp(30, 240).to(torch.uint8)[:, None]
    x = torch.randn(4, 64, generator=generator(3))
    check(entry, x, raw, implementation.matmul(x, raw, entry.ggml_type))


def test_extreme_activations(implementation: Implementation) -> None:
    entry = QUANTISED["Q8_0"]
    raw = random_weights(entry, 9, 2)
    for factor in (1e-30, 1e30):
        x = torch.randn(3, 64, generator=generator(4)) * factor
        check(entry, x, raw, implementation.matmul(x, raw, entry.ggml_type))


ACTIVATIONS = {
    "none": lambda y: y,
    "silu": lambda y: torch.nn.functional.silu(y.chunk(2, 1)[0]) * y.chunk(2, 1)[1],
    "gelu_tanh": lambda y: (
        torch.nn.functional.gelu(y.chunk(2, 1)[0], approximate="tanh") * y.chunk(2, 1)[1]
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", QUANTISED)
def test_norm_matmul(implementation: Implementation, name: str, activation: str) -> None:
    """Against float64, on what the norm is once rounded."""
    entry = QUANTISED[name]
    k, source = 3 * entry.block_size, generator(20)
    norm = torch.randn(k, generator=source) * 0.02 / k**0.5
    for n, m in ((2, 1), (10, 3), (126, 1), (126, 9), (514, 130)):
        raw = random_weights(entry, n, 3)
        stream = torch.randn(m, k, generator=source) * 5
        exact = stream.double() * (stream.double().square().mean(1, True) + 1e-5).rsqrt()
        for dtype, limit in LIMITS.items():
            rounded = (exact * norm).to(dtype)
            wide = Expected.of(entry, rounded.float(), raw)
            want = ACTIVATIONS[activation](wide.y)
            got = implementation.norm_matmul(
                stream, norm, 1e-5, raw, entry.ggml_type, activation, dtype
            )
            assert got.dtype == dtype
            assert got.shape == want.shape
            size = wide.size
            if activation != "none":  # an error of one factor, times the other
                (gate, up), (a, b) = wide.y.chunk(2, 1), wide.size.chunk(2, 1)
                size = a * (1 + up.abs()) + b * (1 + gate.abs())
            error = ((got.double() - want).abs() / (size + 1e-3)).max().item()
            assert error <= limit, f"{n} rows, {m} tokens, {dtype}: {error:.1e}"


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", QUANTISED)
def test_matmul_add(implementation: Implementation, name: str, dtype: torch.dtype) -> None:
    """The product is not rounded to ``dtype`` on its way to the stream."""
    entry = QUANTISED[name]
    for n, m in ((1, 1), (63, 1), (63, 9), (257, 130)):
        raw = random_weights(entry, n, 3)
        x = torch.randn(m, 3 * entry.block_size, generator=generator(21)).mul(0.1).to(dtype)
        stream = torch.randn(m, n, generator=generator(22))
        before = stream.double()
        implementation.matmul_add(x, raw, entry.ggml_type, stream)
        wide = Expected.of(entry, x.float(), raw)
        error = ((stream.double() - before - wide.y).abs() / (wide.size + 1e-3)).max().item()
        assert error <= LIMITS[torch.float32], f"{n} rows, {m} tokens: {error:.1e}"


def test_fused_layouts_and_nothing_to_do(implementation: Implementation) -> None:
    entry = QUANTISED["Q4_1"]
    raw, norm = random_weights(entry, 20, 2), torch.ones(64)
    stream = torch.randn(5, 64, generator=generator(23))
    args = norm, 1e-5, raw, 3, "silu", torch.float32
    want = implementation.norm_matmul(stream, *args)
    strided = torch.stack((stream, stream), dim=-1).view(5, -1)[:, ::2]
    assert torch.equal(implementation.norm_matmul(strided, *args), want)
    assert implementation.norm_matmul(stream[:0], *args).shape == (0, 10)
    sums = [torch.zeros(5, 20) for _ in range(2)]
    implementation.matmul_add(stream, raw, 3, sums[0])
    implementation.matmul_add(strided, raw, 3, sums[1])
    assert torch.equal(*sums)
    assert torch.equal(sums[0], implementation.matmul(stream, raw, 3))
    implementation.matmul_add(stream[:0], raw, 3, sums[0][:0])


def test_bad_fused_arguments(implementation: Implementation) -> None:
    raw, stream, norm = random_weights(QUANTISED["Q4_1"], 3, 2), torch.ones(2, 64), torch.ones(64)
    f32 = torch.float32
    with pytest.raises(ValueError, match=r"x is \[2, 32\], the weights have 64 columns"):
        implementation.norm_matmul(stream[:, :32], norm, 1e-5, raw, 3, "none", f32)
    with pytest.raises(ValueError, match="activation 'relu'; accepted: none, silu, gelu_tanh"):
        implementation.norm_matmul(stream, norm, 1e-5, raw, 3, "relu", f32)
    with pytest.raises(ValueError, match="3 gate and up rows; accepted: an even number"):
        implementation.norm_matmul(stream, norm, 1e-5, raw, 3, "silu", f32)
    with pytest.raises(ValueError, match=r"stream is torch\.float16"):
        implementation.norm_matmul(stream.half(), norm, 1e-5, raw, 3, "none", f32)
    for bad_norm in (norm.half(), norm[:32]):
        with pytest.raises(ValueError, match=r"norm is .*; accepted: torch\.float32 \[64\]"):
            implementation.norm_matmul(stream, bad_norm, 1e-5, raw, 3, "none", f32)
    for bad in (torch.zeros(2, 4), torch.zeros(3, 2).t(), torch.zeros(2, 3).half()):
        with pytest.raises(ValueError, match=r"accepted: torch\.float32 \[2, 3\], dense"):
            implementation.matmul_add(stream, raw, 3, bad)


@pytest.mark.parametrize("name", QUANTISED)
def test_rows(implementation: Implementation, name: str) -> None:
    entry = QUANTISED[name]
    shape = (300, 3 * entry.block_bytes)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(5))
    everything = entry.dequantize(raw)
    for count in (1, 7, 8, 9, 300):
        ids = torch.randint(0, 300, (count,), generator=generator(count))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = implementation.rows(raw, ids, entry.ggml_type, dtype)
            expected = everything[ids].to(dtype)
            nan = expected.isnan()
            assert got.dtype == dtype
            assert torch.equal(got.isnan(), nan)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(got.view(bits)[~nan], expected.view(bits)[~nan])
    with pytest.raises(IndexError):
        implementation.rows(raw, torch.tensor([0, 300]), entry.ggml_type, torch.float32)


def test_bad_arguments(implementation: Implementation) -> None:
    raw = random_weights(QUANTISED["Q4_1"], 3, 2)
    x = torch.ones(1, 64)
    with pytest.raises(ValueError, match=r"x is \[1, 32\], the weights have 64 columns"):
        implementation.matmul(torch.ones(1, 32), raw, 3)
    with pytest.raises(ValueError, match=r"unknown GGML type 99; accepted: .*12 \(Q4_K\)"):
        implementation.matmul(x, raw, 99)
    with pytest.raises(ValueError, match=r"Q4_K weights are torch.uint8 \[3, 40\]; accepted"):
        implementation.matmul(x, raw, 12)
    with pytest.raises(ValueError, match=r"Q4_1 weights are torch.int8 \[3, 40\]; accepted"):
        implementation.matmul(x, raw.view(torch.int8), 3)
    with pytest.raises(ValueError, match=r"Q4_1 weights are torch.uint8 \[3, 39\]; accepted"):
        implementation.rows(raw[:, :39], torch.tensor([0]), 3, torch.float32)


def test_dense_types(implementation: Implementation) -> None:
    """F32, F16 and BF16 tensors of a file are types like the others."""
    weights = torch.randn(7, 24, generator=generator(6))
    x = torch.randn(3, 24, generator=generator(7))
    for code, dtype in ((0, torch.float32), (1, torch.float16), (30, torch.bfloat16)):
        raw = weights.to(dtype).view(torch.uint8)
        products = x @ weights.to(dtype).float().t()
        torch.testing.assert_close(implementation.matmul(x, raw, code), products)
        got = implementation.rows(raw, torch.tensor([6, 0]), code, torch.float32)
        assert torch.equal(got, weights.to(dtype).float()[[6, 0]])


def test_shapes_without_data() -> None:
    x = torch.empty(2, 3, 64, device="meta")
    raw = torch.empty(5, 40, dtype=torch.uint8, device="meta")
    assert quant_matmul(x.bfloat16(), raw, 3).shape == (2, 3, 5)
    assert quant_matmul(x.bfloat16(), raw, 3).dtype == torch.bfloat16
    ids = torch.empty(4, dtype=torch.int64, device="meta")
    assert dequantize_rows(raw, ids, 3, torch.float16).shape == (4, 64)
    with pytest.raises(ValueError, match="columns"):
        quant_matmul(x[..., :32], raw, 3)
    stream, even = torch.empty(2, 64, device="meta"), raw[:4]
    norm, half = torch.empty(64, device="meta"), torch.float16
    for activation, columns in (("none", 4), ("silu", 2)):
        y = quant_norm_matmul(stream, norm, 1e-5, even, 3, activation, half)
        assert (y.shape, y.dtype) == ((2, columns), half)
    quant_matmul_add(stream, even, 3, torch.empty(2, 4, device="meta"))


@pytest.mark.parametrize("name", QUANTISED)
def test_native_rows_do_not_depend_on_the_batch(name: str) -> None:
    need_native()
    entry = QUANTISED[name]
    raw = random_weights(entry, 70, 3)
    x = random_rows(131, 3 * entry.block_size)
    together = quant_matmul(x, raw, entry.ggml_type)
    for m in (0, 1, 57, 127, 128, 130):
        assert torch.equal(quant_matmul(x[m], raw, entry.ggml_type), together[m])
    assert torch.equal(quant_matmul(x[2:37], raw[11:], entry.ggml_type), together[2:37, 11:])
    norm = torch.ones(x.shape[1])
    args = norm, 1e-5, raw, entry.ggml_type, "silu", torch.float32
    normed = quant_norm_matmul(x, *args)
    for m in (0, 57, 130):
        assert torch.equal(quant_norm_matmul(x[m : m + 1], *args)[0], normed[m])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(quant_matmul(x, raw, entry.ggml_type), together)
            assert torch.equal(quant_norm_matmul(x, *args), normed)
    finally:
        torch.set_num_threads(threads)
