"""RMS norm of rows, and the norm of a block's output added to the residual stream.

``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019,
arXiv:1910.07467), computed in float32 and rounded once, to ``dtype``. ``weight`` is float32 ``[D]``
(Gemma's ``1 + w`` is added when a model is loaded). ``x`` is ``[T, D]``, f32, f16 or bf16; rows may
be strided, columns are dense. ``rms_norm_add`` adds y, unrounded, to ``stream`` float32 ``[T, D]``
in place: the norms Gemma has behind attention and MLP.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op

MAX_DIM = 16384


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``[T, D]`` of ``dtype``, dense."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def rms_norm_add_reference(x: Tensor, weight: Tensor, eps: float, stream: Tensor) -> None:
    stream.add_(F.rms_norm(x.float(), weight.shape, weight, eps))


@kernel(do_not_specialize=["rows"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    x_stride,
    y_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of ROWS rows,); with ADD, y is added to."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < DIM)[None, :]
    source = x_ptr + row[:, None] * x_stride + columns[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    variance = tl.sum(x * x, axis=1) / DIM
    weight = tl.load(weight_ptr + columns, mask=columns < DIM, other=0.0)
    y = x * tl.rsqrt(variance + eps)[:, None] * weight[None, :]
    target = y_ptr + row[:, None] * y_stride + columns[None, :]
    if ADD:
        y += tl.load(target, mask=mask, other=0.0)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


@functools.cache
def row_tile(dim: int) -> tuple[int, int, int]:
    """Columns, rows and warps of one program for rows of ``dim`` elements."""
    assert 1 <= dim <= MAX_DIM, f"rows of {dim} elements; 1 to {MAX_DIM} are supported"
    block = next_power_of_2(dim)
    rows = max(1, 512 // block)
    return block, rows, min(16, max(1, block * rows // 256))


def _launch(x: Tensor, weight: Tensor, eps: float, y: Tensor, add: bool) -> None:
    assert x.dim() == 2, f"x {x.shape}"
    assert x.shape == y.shape, f"{x.shape} to {y.shape}"
    assert x.stride(1) == y.stride(1) == 1, "rows must be dense"
    if x.numel() == 0:
        return
    count, dim = x.shape
    block, rows, warps = row_tile(dim)
    pdl = dependent_launch(x.device)
    _rms_norm_kernel[((count + rows - 1) // rows,)](
        x, weight, y, count, x.stride(0), y.stride(0), eps, dim, block, rows, add, bool(pdl),
        num_warps=warps, **pdl,
    )  # fmt: skip


def rms_norm_launcher(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty(*x.shape, dtype=dtype, device=x.device)
    _launch(x, weight, eps, y, add=False)
    return y


def rms_norm_add_launcher(x: Tensor, weight: Tensor, eps: float, stream: Tensor) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    _launch(x, weight, eps, stream, add=True)


def _add_fake(x: Tensor, weight: Tensor, eps: float, stream: Tensor) -> None:
    return None


rms_norm = op(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    rms_norm_reference,
    rms_norm_launcher,
)
rms_norm_add = op(
    "rms_norm_add(Tensor x, Tensor weight, float eps, Tensor(a!) stream) -> ()",
    rms_norm_add_reference,
    rms_norm_add_launcher,
    _add_fake,
)

_SIZES = ((1, 64), (0, 64), (63, 63), (1000, 80), (3, 1), (2, 1000), (5, 2048), (3, 16384))
_AOT = {(1, 64): BF16, (5, 2048): BOTH, (3, 16384): BF16}


def _norm_case(tokens: int, dim: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        weight = random((dim,), torch.float32, device, 2)
        source = torch.float32 if tokens % 2 else dtype  # the stream that is normalised is float32
        return random((tokens, dim + 8), source, device, 1)[:, :dim], weight, 1e-6, dtype

    name, aot = f"rms_norm-{tokens}x{dim}", _AOT.get((tokens, dim), ())
    return Case(name, rms_norm, rms_norm_reference, rms_norm_launcher, build, aot=aot)


def _add_case(tokens: int, dim: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((tokens, dim + 8), dtype, device, 5)[:, :dim]
        stream = random((tokens, dim), torch.float32, device, 6)
        return x, random((dim,), torch.float32, device, 7), 1e-6, stream

    name, aot = f"rms_norm_add-{tokens}x{dim}", _AOT.get((tokens, dim), ())
    fn, reference, launcher = rms_norm_add, rms_norm_add_reference, rms_norm_add_launcher
    return Case(name, fn, reference, launcher, build, mutates=(3,), aot=aot)


def _cases() -> Iterator[Case]:
    for tokens, dim in _SIZES:
        yield _norm_case(tokens, dim)
        yield _add_case(tokens, dim)


CASES = tuple(_cases())
