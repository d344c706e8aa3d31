"""float8 codes in kernels against torch's conversions, bit for bit."""

import torch

from squall.kernels.attention.fp8 import e4m3_bits, e4m3_value, to_cache_dtype
from squall.kernels.attention.rope_store import (
    rope_store_kv_launcher,
    rope_store_kv_reference,
    rotary_table,
)
from squall.kernels.cases import random
from squall.kernels.lang import tl, triton

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8)
FINITE = CODES.view(FP8).float()[(CODES & 0x7F) != 0x7F]


@triton.jit
def _encode(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, e4m3_bits(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def _decode(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, e4m3_value(tl.load(x_ptr + i), tl.float32))


def test_every_code_is_decoded() -> None:
    got = torch.empty(256)
    _decode[(1,)](CODES, got, 256)
    assert torch.equal(got[(CODES & 0x7F) != 0x7F], FINITE)


def test_rounding_and_saturation() -> None:
    neighbours = torch.tensor([1, 1 + 1e-7, 1 - 1e-7, 31 / 32, 33 / 32, 15 / 16, 17 / 16, 1.1, 0.9])
    special = torch.tensor([0, -0.0, 1e30, 448.1, 464, -480, torch.inf, -torch.inf, torch.nan])
    tiny = torch.tensor([1, 2, 3, 5, 7, 9, 63, 64]) * 2.0**-10
    x = torch.cat((torch.outer(FINITE, neighbours).flatten(), special, tiny, -tiny))
    got = torch.empty(x.shape, dtype=torch.uint8)
    _encode[(-(-len(x) // 1024),)](x, got, len(x), 1024)
    assert torch.equal(got, to_cache_dtype(x, FP8).view(torch.uint8))


def test_keys_and_values_are_stored_in_float8() -> None:
    results = []
    for run in (rope_store_kv_reference, rope_store_kv_launcher):
        caches = [torch.zeros((2, 8, 2, 48), dtype=FP8) for _ in range(2)]
        qkv = random((5, 8 * 48), torch.float32, CPU, 71) * 200
        norm = random((48,), torch.float32, CPU, 72) * 300
        slots = torch.tensor([9, -1, 3, 0, 15])
        run(qkv, None, norm, 1e-6, slots.clamp_min(0), rotary_table(20, 32), *caches, slots)
        results.append([cache.float() for cache in caches])
    (k_want, v_want), (k, v) = results
    assert torch.equal(v, v_want)
    assert k_want.abs().max() == v_want.abs().max() == 448
    # Sums in another order may tip a value over the middle between two codes.
    assert ((k - k_want).abs() <= k_want.abs() / 7).all()
    assert (k == k_want).float().mean() > 0.99
