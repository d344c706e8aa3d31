"""Planes of quantised weights: the bits of the file's blocks, and the operators that read them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import Case, results
from squall.kernels.quant import expand, gemv
from squall.kernels.quant.base import QuantFormat, gguf_formats
from squall.kernels.quant.expand import expand_planes, plane_rows
from squall.kernels.quant.planes import (
    Planes,
    concat,
    dequantize,
    layout,
    pack,
    padded,
    random_planes,
)

CPU = torch.device("cpu")
FORMATS = {e.name: e for e in gguf_formats().values() if e.unpack is not None}
# Bytes of a block that hold its float16 numbers, and float16 bits that break careless arithmetic:
# zeros, denormals, one, the largest, infinities, NaN.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
SPECIAL = (0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00)


def random_rows(entry: QuantFormat, rows: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, entry.row_bytes(k))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def extreme_rows(entry: QuantFormat) -> Tensor:
    """One block a row: uniform bytes and random ones under every pair of special scales."""
    fills = [torch.full((entry.block_bytes,), f, dtype=torch.uint8) for f in (0, 0x55, 0x80, 0xFF)]
    noise = random_rows(entry, 1, entry.block_size)[0]
    rows = [*fills, noise]
    if entry.name == "MXFP4":
        powers = torch.cat((fills[3].repeat(256, 1), noise.repeat(256, 1)))
        powers[:, 0] = torch.arange(256).repeat(2)
        return torch.cat((torch.stack(rows), powers))
    for values in itertools.product(SPECIAL, repeat=len(HALVES[entry.name])):
        for base in (fills[0], fills[3], noise):
            row = base.clone()
            for byte, value in zip(HALVES[entry.name], values, strict=True):
                row[byte], row[byte + 1] = value & 255, value >> 8
            rows.append(row)
    return torch.stack(rows)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """NaN where NaN is wanted, the same bits elsewhere."""
    assert got.dtype == want.dtype == torch.float32
    assert got.shape == want.shape
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int32)[~nan], want.view(torch.int32)[~nan])


def weights_by_index(planes: Planes) -> Tensor:
    """float64 ``[N, K]``, each weight looked up on its own where the layout says it is."""
    plan = layout(planes.format.ggml_type)
    k = torch.arange(planes.in_features)

    def field(words: Tensor, bits: int) -> Tensor:
        runs = 8 // bits
        word = k // (32 * runs) * 8 + k % 32 // 4
        shift = 8 * (k % 4) + bits * (k // 32 % runs)
        return (words.long()[:, word] & 0xFFFFFFFF) >> shift & ((1 << bits) - 1)

    q = field(planes.low, plan.low_bits)
    if planes.high is not None:
        q = q + (field(planes.high, plan.high_bits) << plan.low_bits)
    if plan.low_bits == 8:
        q = (q + 128) % 256 - 128
    if planes.format.name == "MXFP4":
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        numbers = torch.cat((e2m1, -e2m1))[q]
        return numbers * 2.0 ** (planes.scales.double()[:, k // 32] - 127)
    scales = planes.scales.double()[:, k // plan.group]
    supers = None if planes.supers is None else planes.supers.double()[:, k // 256]
    if scales.dim() == 2:
        return scales * (1 if supers is None else supers) * (q - plan.offset)
    scale, minimum = scales.unbind(-1)
    if supers is None:
        return scale * q + minimum
    return supers[..., 0] * scale * q - supers[..., 1] * minimum


@pytest.mark.parametrize("name", FORMATS)
def test_random_blocks_come_back(name: str) -> None:
    entry = FORMATS[name]
    for rows, k in ((1, 256), (7, 512), (3, 1280)):
        raw = random_rows(entry, rows, k, seed=k)
        planes = pack(entry, raw)
        assert (planes.out_features, planes.in_features, planes.padded) == (rows, k, k)
        assert_same_bits(dequantize(planes), entry.dequantize(raw))


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_blocks_come_back(name: str) -> None:
    entry = FORMATS[name]
    raw = extreme_rows(entry)
    assert_same_bits(dequantize(pack(entry, raw)), entry.dequantize(raw))


@pytest.mark.parametrize("name", [n for n, e in FORMATS.items() if e.block_size == 32])
def test_rows_that_are_not_whole_super_blocks(name: str) -> None:
    entry = FORMATS[name]
    for k in (32, 224, 288, 1056):
        raw = random_rows(entry, 5, k, seed=k)
        planes = pack(entry, raw)
        assert planes.padded == padded(k)
        assert planes.low.shape[1] * 32 == planes.padded * layout(entry.ggml_type).low_bits
        assert_same_bits(dequantize(planes), entry.dequantize(raw))
        beyond = planes.scales.flatten(2)[:, k // 32 :] if planes.scales.dim() == 3 else None
        assert not (planes.scales[:, k // 32 :] if beyond is None else beyond).any()


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_lies_where_the_layout_says(name: str) -> None:
    entry = FORMATS[name]
    planes = random_planes(entry, 3, 768, CPU, torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        dequantize(planes).double(), weights_by_index(planes), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", FORMATS)
def test_packing_in_chunks_and_from_any_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = FORMATS[name]
    raw = random_rows(entry, 9, 512)
    want = pack(entry, raw)
    monkeypatch.setattr("squall.kernels.quant.planes._CHUNK_WEIGHTS", 1024)
    strided = torch.cat((raw, raw), 1)[:, : raw.shape[1]]
    shifted = torch.cat((raw.new_zeros(1), raw.flatten()))[1:].view(raw.shape)
    for source in (raw, strided, shifted):
        before = source.clone()
        for got, wanted in zip(pack(entry, source).tensors, want.tensors, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                assert got.is_contiguous()
                assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(source, before)


@pytest.mark.parametrize("name", FORMATS)
def test_random_planes(name: str) -> None:
    entry = FORMATS[name]
    k = 1056 if entry.block_size == 32 else 1024
    planes = random_planes(entry, 200, k, CPU, torch.Generator().manual_seed(1))
    weights = dequantize(planes)
    assert weights.shape == (200, k)
    assert weights.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(weights.mean().item()) < 0.005
    bits = planes.nbytes * 8 / (200 * planes.padded)
    assert bits == pytest.approx(layout(entry.ggml_type).bits)
    assert bits <= entry.block_bytes * 8 / entry.block_size + 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_concat(name: str) -> None:
    entry = FORMATS[name]
    raws = [random_rows(entry, rows, 256, seed=rows) for rows in (1, 4, 3)]
    planes = concat([pack(entry, raw) for raw in raws])
    assert planes.out_features == 8
    assert_same_bits(dequantize(planes), entry.dequantize(torch.cat(raws)))


def test_errors_name_what_is_wrong() -> None:
    dense = next(e for e in gguf_formats().values() if e.unpack is None)
    with pytest.raises(ValueError, match=dense.name):
        layout(dense.ggml_type)
    with pytest.raises(ValueError, match="999"):
        layout(999)
    with pytest.raises(ValueError, match="Q4_K"):
        pack(FORMATS["Q4_K"], torch.zeros(2, 145, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 256"):
        random_planes(FORMATS["Q4_K"], 2, 128, CPU)


def test_activations_are_rounded_to_16_bits_a_block() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 3, 96)
    x[1, :32] = 0
    x[2, 40] = 1e30
    got = gemv.rounded(x)
    largest = x.view(4, 3, 32).abs().amax(-1, keepdim=True)
    assert ((got - x).view(4, 3, 32).abs() <= largest / 32639 * 0.505).all()
    found = got.view(4, 3, 32).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(found, largest, rtol=2e-7, atol=0)
    assert torch.equal(gemv.rounded(x[2:3]), got[2:3])


def expand_formula(*args: Any) -> tuple[Tensor, ...]:
    low, high, scales, supers, kind, k, dtype = args
    return (weights_by_index(Planes(gguf_formats()[kind], k, low, high, scales, supers)).to(dtype),)


def rows_formula(*args: Any) -> tuple[Tensor, ...]:
    *planes, ids, dtype = args
    return (expand_formula(*planes, torch.float64)[0][ids.long()].to(dtype),)


def gemv_product(x: Tensor, *args: Any) -> Tensor:
    low, high, scales, supers, kind, bias = args
    planes = Planes(gguf_formats()[kind], x.shape[1], low, high, scales, supers)
    y = gemv.rounded(x).double() @ weights_by_index(planes).t()
    return y if bias is None else y + bias


def gemv_formula(*args: Any) -> tuple[Tensor, ...]:
    x, norm, eps, *inputs, activation, out = args
    if norm is not None:
        x = (x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * norm).float()
    y = gemv_product(x, *inputs)
    if activation != "none":
        gate, up = y.tensor_split(2, -1)
        y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return (y.to(out.dtype),)


def gemv_pair_formula(*args: Any) -> tuple[Tensor, ...]:
    *inputs, first, first_type, second, second_type, bias, out = args
    parts = [
        gemv_formula(*inputs, *planes, kind, None, "none", out.double())[0]
        for planes, kind in ((first, first_type), (second, second_type))
    ]
    y = torch.cat(parts, 1)
    return ((y if bias is None else y + bias).to(out.dtype),)


def gemv_add_formula(*args: Any) -> tuple[Tensor, ...]:
    *inputs, stream = args
    return ((gemv_product(*inputs) + stream).float(),)


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "squall::expand_planes": expand_formula,
    "squall::plane_rows": rows_formula,
    "squall::plane_gemv": gemv_formula,
    "squall::plane_gemv_pair": gemv_pair_formula,
    "squall::plane_gemv_add": gemv_add_formula,
}
CASES = expand.CASES + gemv.CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operators_match_the_formulas(case: Case, dtype: torch.dtype, check_results) -> None:
    want = FORMULAS[case.op._schema.name](*case.build(dtype, CPU))  # type: ignore[attr-defined]
    for fn in (case.op, case.reference):
        check_results(case, results(case, fn, case.build(dtype, CPU)), want)


def first_cases() -> dict[str, Case]:
    """The smallest of each operator, without those whose results are prepared for comparison."""
    return {
        c.op._schema.name: c  # type: ignore[attr-defined]
        for c in reversed(expand.CASES + gemv.CASES)
    }


@pytest.mark.parametrize("case", first_cases().values(), ids=first_cases())
def test_opcheck(case: Case) -> None:
    args = tuple(
        a.nan_to_num() if isinstance(a, Tensor) else a for a in case.build(torch.float32, CPU)
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(case.op, args, test_utils=tests)  # type: ignore[arg-type]


def test_expanding_a_slice_gives_its_rows() -> None:
    planes = random_planes(FORMATS["Q6_K"], 7, 512, CPU, torch.Generator().manual_seed(4))
    kind = planes.format.ggml_type
    sliced = (None if t is None else t[2:5] for t in planes.tensors)
    got = expand_planes(*sliced, kind, 512, torch.float32)
    assert_same_bits(got, dequantize(planes)[2:5])
    ids = torch.tensor([4, 2])
    assert torch.equal(plane_rows(*planes.tensors, kind, 512, ids, torch.float32), got[[2, 0]])


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class TestOnAGpu:
    """What must be the same bits as on the CPU."""

    pytestmark = gpu

    @pytest.mark.parametrize("name", FORMATS)
    def test_packing_and_expanding(self, name: str) -> None:
        entry = FORMATS[name]
        raw = torch.cat((extreme_rows(entry), random_rows(entry, 300, entry.block_size)))
        planes = pack(entry, raw.cuda())
        want = entry.dequantize(raw)
        assert_same_bits(dequantize(planes).cpu(), want)
        kind, k = entry.ggml_type, entry.block_size
        assert_same_bits(expand_planes(*planes.tensors, kind, k, torch.float32).cpu(), want)
        ids = torch.arange(0, len(raw), 3, dtype=torch.int32)
        got = plane_rows(*planes.tensors, kind, k, ids.cuda(), torch.float32)
        assert_same_bits(got.cpu(), want[ids.long()])
