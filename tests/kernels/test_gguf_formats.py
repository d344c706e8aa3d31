"""GGML block formats against the ``gguf`` package, bit for bit."""

import itertools

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, gguf_formats

FORMATS = {entry.name: entry for entry in gguf_formats().values()}
QUANTISED = {name: entry for name, entry in FORMATS.items() if entry.unpack is not None}

# Where a block keeps its float16 numbers.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
# float16 bits: 0, -0, smallest and largest denormals, smallest normal, 1, max, inf, -inf, NaNs.
SPECIAL = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFD01)


def reference(entry: QuantFormat, blocks: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType(entry.ggml_type)
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).copy())


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """NaN where NaN is expected (payloads are the processor's), the same bits elsewhere."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def extreme_blocks(entry: QuantFormat) -> Tensor:
    """Uniform bytes, and every combination of special scales over uniform and random bytes."""
    fills = [0x00, 0x01, 0x0F, 0x55, 0x7F, 0x80, 0xAA, 0xF0, 0xFE, 0xFF]
    blocks = [torch.full((entry.block_bytes,), fill, dtype=torch.uint8) for fill in fills]
    offsets = HALVES.get(entry.name, ())
    for seed, values in enumerate(itertools.product(SPECIAL, repeat=len(offsets))):
        for base in (blocks[0], blocks[9], random_bytes(entry.block_bytes, seed=seed)):
            block = base.clone()
            for offset, value in zip(offsets, values, strict=True):
                block[offset], block[offset + 1] = value & 255, value >> 8
            blocks.append(block)
    if entry.name == "MXFP4":
        blocks += every_power(blocks[9])
        blocks += every_power(random_bytes(entry.block_bytes, seed=1))
    return torch.stack(blocks)


def every_power(block: Tensor) -> list[Tensor]:
    """A block of MXFP4 under each exponent."""
    blocks = block.repeat(256, 1)
    blocks[:, 0] = torch.arange(256)
    return list(blocks)


def test_registry_matches_ggml() -> None:
    assert list(FORMATS) == ["F32", "F16", *HALVES, "BF16", "MXFP4"]
    for code, entry in gguf_formats().items():
        kind = gguf.GGMLQuantizationType(code)
        assert entry.name == kind.name
        assert (entry.block_size, entry.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 9), (2, 3, 5, 2)], ids=str)
def test_random_bytes(name: str, shape: tuple[int, ...]) -> None:
    entry = FORMATS[name]
    blocks = random_bytes(*shape[:-1], shape[-1] * entry.block_bytes, seed=len(shape))
    assert_same_bits(entry.dequantize(blocks), reference(entry, blocks))


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_blocks(name: str) -> None:
    entry = FORMATS[name]
    blocks = extreme_blocks(entry)
    assert_same_bits(entry.dequantize(blocks), reference(entry, blocks))


def test_every_half_precision_number() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8)[None]
    for name in ("F16", "BF16"):
        assert_same_bits(FORMATS[name].dequantize(bits), reference(FORMATS[name], bits))


def test_every_code_of_mxfp4() -> None:
    block = torch.tensor([[128, *(17 * code for code in range(16))]], dtype=torch.uint8)
    want = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    assert FORMATS["MXFP4"].dequantize(block)[0].tolist() == want * 2


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_come_back(name: str) -> None:
    entry = FORMATS[name]
    weights = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    kind = gguf.GGMLQuantizationType(entry.ggml_type)
    blocks = torch.from_numpy(gguf.quants.quantize(weights.numpy(), kind))
    restored = entry.dequantize(blocks)
    assert_same_bits(restored, reference(entry, blocks))
    step = weights.abs().amax() * 2 / (2**entry.bits - 2)  # the coarsest spacing of levels
    assert (restored - weights).abs().max() <= step


@pytest.mark.parametrize("name", QUANTISED)
def test_affine_is_the_same_weights(name: str) -> None:
    entry = QUANTISED[name]
    blocks = torch.cat((random_bytes(400, entry.block_bytes), extreme_blocks(entry)))
    blocks = blocks.view(-1, 2 * entry.block_bytes) if len(blocks) % 2 == 0 else blocks
    affine = entry.affine(blocks)
    width = blocks.shape[-1] // entry.block_bytes * entry.block_size
    assert affine.group == entry.group
    assert affine.q.shape == (len(blocks), width)
    assert affine.scale.shape == affine.minimum.shape == (len(blocks), width // entry.group)
    assert affine.scale.dtype == affine.minimum.dtype == torch.float32
    grouped = affine.q.float().view(*affine.scale.shape, entry.group)
    weights = grouped * affine.scale[..., None] + affine.minimum[..., None]
    expected = entry.dequantize(blocks)
    torch.testing.assert_close(
        weights.view(expected.shape), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", QUANTISED)
def test_affine_integers_have_the_stated_range(name: str) -> None:
    entry = QUANTISED[name]
    affine = entry.affine(random_bytes(2000, entry.block_bytes))
    low, high = (
        (-(2 ** (entry.bits - 1)), 2 ** (entry.bits - 1) - 1)
        if entry.signed
        else (0, 2**entry.bits - 1)
    )
    assert affine.q.dtype == (torch.int8 if entry.signed else torch.uint8)
    if name == "MXFP4":
        assert sorted(set(affine.q.flatten().tolist())) == sorted(set(gguf.quants.MXFP4.kvalues))
    else:
        assert (affine.q.min().item(), affine.q.max().item()) == (low, high)
    if entry.signed:
        assert not affine.minimum.any()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_dense_formats_are_not_affine(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FORMATS[name].affine(random_bytes(1, 32))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["odd offset", "strided rows", "one row of many"])
def test_memory_layouts(name: str, layout: str) -> None:
    entry = FORMATS[name]
    size = 2 * entry.block_bytes
    if layout == "odd offset":
        blocks = random_bytes(4 * size + 1)[1:].view(4, size)
    elif layout == "strided rows":
        blocks = random_bytes(8, size)[::2]
    else:
        blocks = random_bytes(3, size)[1]
    assert_same_bits(entry.dequantize(blocks), reference(entry, blocks.contiguous()))


@pytest.mark.parametrize("name", FORMATS)
def test_input_is_left_alone(name: str) -> None:
    blocks = random_bytes(4, 2 * FORMATS[name].block_bytes)
    before = blocks.clone()
    FORMATS[name].dequantize(blocks).add_(1)
    assert torch.equal(blocks, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_gives_the_same_bits(name: str) -> None:
    entry = FORMATS[name]
    blocks = torch.cat((random_bytes(500, entry.block_bytes), extreme_blocks(entry)))
    assert_same_bits(entry.dequantize(blocks.cuda()).cpu(), entry.dequantize(blocks))
