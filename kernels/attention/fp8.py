"""float8_e4m3fn caches in kernels, as bytes where the chip has no conversion for them.

A byte is sign, 4 bits of exponent (bias 7) and 3 of mantissa; 0x7F and 0xFF are NaN, there is no
infinity and the largest number is 448 (Micikevicius et al. 2022, arXiv:2209.05433). Bytes are
decoded and rounded with integer steps, which run on Ampere and in Triton's interpreter too.
"""

import functools

import torch
from torch import Tensor

from squall.kernels.lang import tl, triton

E4M3_MAX = 448.0


@functools.cache
def _converts(device: torch.device) -> bool:
    """Whether kernels for this device read float8 themselves: NVIDIA's do from 8.9 on."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 89)


def written(cache: Tensor) -> Tensor:
    """What a kernel that writes gets of a cache: the bytes of float8, others as they are."""
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8)
    assert cache.dtype in (torch.float32, torch.float16, torch.bfloat16), f"cache {cache.dtype}"
    return cache


def read(cache: Tensor) -> Tensor:
    """What a kernel that reads gets of a cache; ``value_as`` understands both."""
    native = cache.dtype == torch.float8_e4m3fn and _converts(cache.device)
    return cache if native else written(cache)


def to_cache_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``dtype``; float8 saturates instead of turning large numbers into NaN."""
    if dtype == torch.float8_e4m3fn:
        return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(dtype)
    return x.to(dtype)


@triton.jit
def e4m3_bits(x):  # type: ignore[no-untyped-def]
    """uint8 of the nearest float8 (ties to even, saturating) of ``x`` float32; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    size = tl.minimum(magnitude, 0x43E00000)  # 448
    # Normal numbers lose 20 bits of mantissa; 960 is the difference of the biases, 120, shifted.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2**-6 the step is 2**-9, which is the last bit of a float32 between 2**14 and 2**15.
    small = size.to(tl.float32, bitcast=True) + 16384.0
    subnormal = small.to(tl.int32, bitcast=True) - 0x46800000  # 16384
    code = tl.where(size < 0x3C800000, subnormal, normal)  # 2**-6
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_value(code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The finite numbers of uint8 ``code``, exact in ``dtype`` (f32, f16 or bf16).

    Read as float16 the bits mean 2**-8 of the number, subnormals included; NaN is not kept.
    """
    wide = code.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return (half * 256.0).to(dtype)


@triton.jit
def stored_as(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` float32 as elements of a cache of ``dtype``; uint8 are the bytes of float8."""
    return e4m3_bits(x) if dtype == tl.uint8 else x.to(dtype)


@triton.jit
def value_as(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a cache as ``dtype``; uint8 are the bytes of float8."""
    return e4m3_value(x, dtype) if x.dtype == tl.uint8 else x.to(dtype)
