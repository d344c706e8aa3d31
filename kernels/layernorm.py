"""Layer norm of rows: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension.

Ba et al. 2016 (arXiv:1607.06450), computed in float32 and rounded once, to ``dtype``; ``var`` is
the mean of the squared differences. ``x`` is ``[T, D]``, f32, f16 or bf16; rows may be strided,
columns are dense. ``weight`` float32 ``[D]``, ``bias`` likewise or None.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op
from squall.kernels.rmsnorm import row_tile


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """``[T, D]`` of ``dtype``, dense."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)


@kernel(do_not_specialize=["rows", "eps"])
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of ROWS rows,)."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    mask = (row < rows)[:, None] & inside[None, :]
    source = x_ptr + row[:, None] * x_stride + columns[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / DIM
    x = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / DIM
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    y = x * tl.rsqrt(variance + eps)[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    target = y_ptr + row[:, None] * DIM + columns[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


def layer_norm_launcher(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    assert x.dim() == 2, f"x {x.shape}"
    assert x.stride(1) == 1, "rows must be dense"
    y = torch.empty(*x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return y
    count, dim = x.shape
    block, rows, warps = row_tile(dim)
    pdl = dependent_launch(x.device)
    _layer_norm_kernel[((count + rows - 1) // rows,)](
        x, weight, bias, y, count, x.stride(0), eps, dim, block, rows, bool(pdl),
        num_warps=warps, **pdl,
    )  # fmt: skip
    return y


layer_norm = op(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
    layer_norm_reference,
    layer_norm_launcher,
)


def _case(tokens: int, dim: int, bias: bool, aot: tuple[torch.dtype, ...] = ()) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        source = torch.float32 if tokens % 2 else dtype  # the stream that is normalised is float32
        x = random((tokens, dim + 8), source, device, 1)[:, :dim] + 2
        vectors = [random((dim,), torch.float32, device, seed) for seed in (2, 3)]
        return x, vectors[0], vectors[1] if bias else None, 1e-5, dtype

    name = f"layer_norm-{tokens}x{dim}{'-bias' * bias}"
    return Case(name, layer_norm, layer_norm_reference, layer_norm_launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case(1, 64, bias=True, aot=BF16)
    yield _case(0, 64, bias=False)
    yield _case(63, 63, bias=False)
    yield _case(3, 1, bias=True)
    yield _case(2, 1000, bias=True)
    yield _case(5, 2048, bias=False, aot=BOTH)


CASES = tuple(_cases())
