"""Activations in 16-bit blocks: what the byte products of :mod:`squall.kernels.quant.gemv` take.

Rows of K numbers are padded with zeros to ``padded`` (a multiple of 256) and cut into blocks of 32:

    scale = max|x| / 32639            float32
    x16   = round_half_even(x / scale)    in [-32639, 32639]; 0 in blocks of zeros
    x16   = 256 * hi + lo             hi and lo int8, hi in [-127, 127]

32639 is 256 * 127 + 127. An element is off by at most scale / 2, 1.5e-5 of its block's largest,
which is less than rounding to bfloat16 or float16 costs, so products are as good as with floating-
point activations, and a row's result does not depend on its company. Results:

    parts  int8    [2, M, padded]     hi, then lo
    scale  float32 [M, padded / 32]
    sums   int32   [M, padded / 16]   of x16: what offsets and minimums of weights multiply

``quantize_rows`` takes ``x [M, K]`` (f32, f16, bf16; rows may be strided). ``norm_quantize_rows``
takes the residual stream, float32 ``[M, K]``, and normalises it first, in float32:
``stream / sqrt(mean(stream^2) + eps) * norm`` with ``norm`` float32 ``[K]``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op
from squall.kernels.quant.planes import padded as pad_columns
from squall.kernels.rmsnorm import MAX_DIM

Quantized = tuple[Tensor, Tensor, Tensor]

BLOCK = 32
LARGEST = 32639


def quantize_rows_reference(x: Tensor, padded: int) -> Quantized:
    rows = x.shape[0]
    blocks = F.pad(x.float(), (0, padded - x.shape[1])).view(rows, padded // BLOCK, BLOCK)
    scale = blocks.abs().amax(-1) / LARGEST
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    x16 = (blocks / divisor.unsqueeze(-1)).round().int().view(rows, padded)
    low = ((x16 + 128) & 255) - 128
    parts = torch.stack(((x16 - low) >> 8, low)).to(torch.int8)
    return parts, scale, x16.view(rows, padded // 16, 16).sum(-1, dtype=torch.int32)


def norm_quantize_rows_reference(
    stream: Tensor, norm: Tensor, eps: float, padded: int
) -> Quantized:
    return quantize_rows_reference(F.rms_norm(stream, norm.shape, norm, eps), padded)


def restore(quantized: Quantized) -> Tensor:
    """float32 ``[M, padded]``: the numbers that the blocks stand for."""
    parts, scale, _ = quantized
    x16 = parts[0].int() * 256 + parts[1]
    blocks = x16.float().view(*scale.shape, BLOCK) * scale.unsqueeze(-1)
    return blocks.view(x16.shape)


@triton.jit
def _columns(start, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of BLOCKS blocks from ``start``, ``[BLOCKS, 2, 16]``."""
    block = tl.arange(0, BLOCKS)[:, None, None] * 32
    half = tl.arange(0, 2)[None, :, None] * 16
    return start + (block + half + tl.arange(0, 16)[None, None, :])


@triton.jit
def _store_blocks(  # type: ignore[no-untyped-def]
    x, start, row, rows, parts_ptr, scale_ptr, sums_ptr, PADDED: tl.constexpr
):
    """Quantise ``x``, float32 ``[B, 2, 16]``: the columns from ``start`` of row ``row``."""
    BLOCKS: tl.constexpr = x.shape[0]
    largest = tl.max(tl.max(tl.abs(x), axis=2), axis=1)
    # Divisions are IEEE's, and adding 1.5 * 2^23 rounds half to even: every device gets the same
    # integers.
    scale = tl.div_rn(largest, tl.full([BLOCKS], 32639.0, tl.float32))
    divisor = tl.where(scale == 0.0, 1.0, scale)
    q = tl.div_rn(x, tl.broadcast_to(divisor[:, None, None], BLOCKS, 2, 16))
    q = ((q + 12582912.0) - 12582912.0).to(tl.int32)
    low = ((q + 128) & 255) - 128
    columns = _columns(start, BLOCKS)
    target = parts_ptr + row * PADDED + columns
    tl.store(target, ((q - low) >> 8).to(tl.int8), mask=columns < PADDED)
    tl.store(target + rows.to(tl.int64) * PADDED, low.to(tl.int8), mask=columns < PADDED)
    block = start // 32 + tl.arange(0, BLOCKS)
    tl.store(scale_ptr + row * (PADDED // 32) + block, scale, mask=block < PADDED // 32)
    half = block[:, None] * 2 + tl.arange(0, 2)[None, :]
    sums = tl.sum(q, axis=2)
    tl.store(sums_ptr + row * (PADDED // 16) + half, sums, mask=half < PADDED // 16)


@kernel(do_not_specialize=["rows"])
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    parts_ptr,
    scale_ptr,
    sums_ptr,
    rows,
    x_stride,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, groups of BLOCKS blocks)."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * (BLOCKS * 32)
    columns = _columns(start, BLOCKS)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
    _store_blocks(x, start, row, rows, parts_ptr, scale_ptr, sums_ptr, PADDED)


@kernel(do_not_specialize=["rows", "eps"])
def _norm_quantize_kernel(  # type: ignore[no-untyped-def]
    stream_ptr,
    norm_ptr,
    parts_ptr,
    scale_ptr,
    sums_ptr,
    rows,
    stream_stride,
    eps,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows,): BLOCKS covers a row. The norm's weight depends on no kernel before."""
    row = tl.program_id(0).to(tl.int64)
    columns = _columns(0, BLOCKS)
    norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0)
    wait_for_inputs(PDL)
    x = tl.load(stream_ptr + row * stream_stride + columns, mask=columns < K, other=0.0)
    square = tl.sum(tl.sum(tl.sum(x * x, axis=2), axis=1), axis=0)
    x = x * tl.rsqrt(square / K + eps) * norm
    _store_blocks(x, 0, row, rows, parts_ptr, scale_ptr, sums_ptr, PADDED)


def _allocate(rows: int, padded: int, k: int, device: torch.device) -> Quantized:
    assert padded == pad_columns(k), f"{k} columns padded to {padded}"
    parts = torch.empty((2, rows, padded), dtype=torch.int8, device=device)
    scale = torch.empty((rows, padded // BLOCK), dtype=torch.float32, device=device)
    return parts, scale, torch.empty((rows, padded // 16), dtype=torch.int32, device=device)


def quantize_rows_launcher(x: Tensor, padded: int) -> Quantized:
    assert x.dim() == 2, f"x {x.shape}"
    assert x.stride(1) == 1, "rows must be dense"
    rows, k = x.shape
    parts, scale, sums = _allocate(rows, padded, k, x.device)
    if rows:
        blocks = 16
        grid = (rows, triton.cdiv(padded, blocks * BLOCK))
        pdl = dependent_launch(x.device)
        _quantize_kernel[grid](
            x, parts, scale, sums, rows, x.stride(0), k, padded, blocks, bool(pdl),
            num_warps=4, **pdl,
        )  # fmt: skip
    return parts, scale, sums


def norm_quantize_rows_launcher(stream: Tensor, norm: Tensor, eps: float, padded: int) -> Quantized:
    assert stream.dim() == 2, f"stream {stream.shape}"
    assert stream.stride(1) == 1, "rows must be dense"
    assert stream.dtype == norm.dtype == torch.float32, f"stream {stream.dtype}, norm {norm.dtype}"
    rows, k = stream.shape
    assert k <= MAX_DIM, f"rows of {k} elements; at most {MAX_DIM} are supported"
    parts, scale, sums = _allocate(rows, padded, k, stream.device)
    if rows:
        blocks = next_power_of_2(padded // BLOCK)
        pdl = dependent_launch(stream.device)
        _norm_quantize_kernel[(rows,)](
            stream, norm, parts, scale, sums, rows, stream.stride(0), eps, k, padded, blocks,
            bool(pdl), num_warps=min(16, max(4, blocks // 8)), **pdl,
        )  # fmt: skip
    return parts, scale, sums


quantize_rows = op(
    "quantize_rows(Tensor x, int padded) -> (Tensor, Tensor, Tensor)",
    quantize_rows_reference,
    quantize_rows_launcher,
)
norm_quantize_rows = op(
    "norm_quantize_rows(Tensor stream, Tensor norm, float eps, int padded)"
    " -> (Tensor, Tensor, Tensor)",
    norm_quantize_rows_reference,
    norm_quantize_rows_launcher,
)


def _as_numbers(fn: Callable[..., Quantized]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``fn`` with results that can be compared: one step up or down changes both parts.

    The row and its sums, as float16: rounding to 16 bits is below that.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> tuple[Tensor, Tensor]:
        parts, scale, sums = fn(*args)
        return (
            restore((parts, scale, sums)).half(),
            (sums * scale.repeat_interleave(2, 1)).half(),
        )

    return run


def _quantize_case(rows: int, k: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((rows, k + 3), dtype, device, 31)[:, :k]
        x[:, : k // 2] *= 1e-3
        x[:, 32:64] = 0
        return x, pad_columns(k)

    run, reference, launcher = map(
        _as_numbers, (quantize_rows, quantize_rows_reference, quantize_rows_launcher)
    )
    large, name = k == 4096, f"quantize_rows-{rows}x{k}"
    aot = BOTH * large
    return Case(name, run, reference, launcher, build, interpret=not large, aot=aot)


def _norm_quantize_case(rows: int, k: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        stream = random((rows, k + 3), torch.float32, device, 32)[:, :k]
        return stream, random((k,), torch.float32, device, 33), 1e-6, pad_columns(k)

    run, reference, launcher = map(
        _as_numbers, (norm_quantize_rows, norm_quantize_rows_reference, norm_quantize_rows_launcher)
    )
    large, name = k >= 4096, f"norm_quantize_rows-{rows}x{k}"
    aot = BF16 * large
    return Case(name, run, reference, launcher, build, interpret=not large, aot=aot)


def _cases() -> Iterator[Case]:
    for rows, k in ((1, 256), (3, 96), (0, 64), (8, 1056), (1, 4096), (2, 16384)):
        yield _quantize_case(rows, k)
        yield _norm_quantize_case(rows, k)


CASES = tuple(_cases())
