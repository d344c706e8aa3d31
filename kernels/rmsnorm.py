"""RMS norm, plain and fused with the residual addition.

``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019,
arXiv:1910.07467), computed in float32 and rounded once to the dtype of ``x``. ``weight`` is
float32 ``[D]`` (Gemma's ``1 + w`` is added when a model is loaded). ``x`` is ``[..., D]``, f32,
f16 or bf16; leading dimensions may be strided (a q or k slice of a fused qkv tensor), the last
one is dense. ``add_rms_norm`` takes rows ``[T, D]``; ``x + residual`` is rounded to the dtype of
``residual`` (float32, or that of ``x``) and that sum is normalised.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.op import op

MAX_DIM = 16384


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[..., D]`` like ``x``, dense."""
    shape = weight.shape
    if x.dtype == torch.float32:
        return F.rms_norm(x, shape, weight, eps)
    return F.rms_norm(x.float(), shape, weight, eps).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, both ``[T, D]``, the first like ``x``."""
    total = x + residual
    return rms_norm_reference(total, weight, eps).to(x.dtype), total


@triton.jit
def _normalise(x, weight_ptr, columns, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``x`` f32 [ROWS, BLOCK], zero past DIM, to normalised f32 rows."""
    variance = tl.sum(x * x, axis=1) / DIM
    weight = tl.load(weight_ptr + columns, mask=columns < DIM, other=0.0).to(tl.float32)
    return x * tl.rsqrt(variance + eps)[:, None] * weight[None, :]


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row r of x lies at (r // inner) * outer_stride + (r % inner) * inner_stride."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < DIM)[None, :]
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    x = tl.load(x_ptr + start[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _normalise(x, weight_ptr, columns, eps, DIM)
    offsets = row[:, None] * DIM + columns[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < DIM)[None, :]
    x_offsets = row[:, None] * x_stride + columns[None, :]
    residual_offsets = row[:, None] * residual_stride + columns[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    offsets = row[:, None] * DIM + columns[None, :]
    tl.store(total_ptr + offsets, total, mask=mask)
    y = _normalise(total.to(tl.float32), weight_ptr, columns, eps, DIM)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def _tile(dim: int) -> tuple[int, int, int]:
    """Columns, rows and warps of one program for rows of ``dim`` elements."""
    assert 1 <= dim <= MAX_DIM, f"rows of {dim} elements; 1 to {MAX_DIM} are supported"
    block = next_power_of_2(dim)
    rows = max(1, 512 // block)
    return block, rows, min(16, max(1, block * rows // 256))


def rms_norm_launcher(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    dim = x.shape[-1]
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.reshape(-1, dim).contiguous()
    heads, outer, inner = 1, 0, 0  # one row
    if x.dim() == 2:
        outer = x.stride(0)
    elif x.dim() == 3:
        heads, outer, inner = x.shape[1], x.stride(0), x.stride(1)
    block, rows, warps = _tile(dim)
    count = y.numel() // dim
    _rms_norm_kernel[((count + rows - 1) // rows,)](
        x, weight, y, count, heads, outer, inner, eps, dim, block, rows, num_warps=warps
    )
    return y


def add_rms_norm_launcher(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    assert x.dim() == 2, f"x {x.shape}"
    assert x.shape == residual.shape, f"{x.shape} + {residual.shape}"
    assert x.stride(1) == residual.stride(1) == 1, "rows must be dense"
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if x.numel() == 0:
        return y, total
    count, dim = x.shape
    block, rows, warps = _tile(dim)
    _add_rms_norm_kernel[((count + rows - 1) // rows,)](
        x, residual, weight, y, total, count, x.stride(0), residual.stride(0), eps,
        dim, block, rows, num_warps=warps,
    )  # fmt: skip
    return y, total


rms_norm = op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rms_norm_reference,
    rms_norm_launcher,
)
add_rms_norm = op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm_reference,
    add_rms_norm_launcher,
)

_SIZES = ((1, 64), (0, 64), (63, 63), (1000, 80), (3, 1), (2, 1000), (5, 2048), (3, 16384))
_AOT = {(1, 64): BF16, (5, 2048): BOTH, (3, 16384): BF16}


def _plain_case(tokens: int, dim: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        weight = random((dim,), torch.float32, device, 2)
        return random((tokens, dim), dtype, device, 1), weight, 1e-6

    aot = _AOT.get((tokens, dim), ())
    name = f"rms_norm-{tokens}x{dim}"
    return Case(name, rms_norm, rms_norm_reference, rms_norm_launcher, build, aot=aot)


def _head_case(tokens: int, heads: int, dim: int) -> Case:
    """The k heads of a fused qkv tensor: strided, not dense."""

    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        qkv = random((tokens, heads + 5, dim), dtype, device, 3)
        return qkv[:, 3 : 3 + heads], random((dim,), torch.float32, device, 4), 1e-5

    name = f"rms_norm-heads-{tokens}x{heads}x{dim}"
    return Case(
        name, rms_norm, rms_norm_reference, rms_norm_launcher, build, aot=BF16 * (dim == 128)
    )


def _add_case(tokens: int, dim: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
        x = random((tokens, dim), dtype, device, 5)
        wide = torch.float32 if tokens % 2 else dtype  # the residual stream is usually float32
        residual = random((tokens, dim + 8), wide, device, 6)[:, :dim]
        return x, residual, random((dim,), torch.float32, device, 7), 1e-6

    name = f"add_rms_norm-{tokens}x{dim}"
    aot = _AOT.get((tokens, dim), ())
    return Case(name, add_rms_norm, add_rms_norm_reference, add_rms_norm_launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    for tokens, dim in _SIZES:
        yield _plain_case(tokens, dim)
        yield _add_case(tokens, dim)
    for shape in ((1, 4, 128), (63, 1, 64), (7, 3, 256), (0, 2, 96), (2, 5, 80)):
        yield _head_case(*shape)


CASES = tuple(_cases())
