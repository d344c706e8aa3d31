"""Products with weights that stay in their file's blocks, and rows taken out of them.

``quant_matmul(x, raw, ggml_type)``: ``x [..., K]`` (f32, f16 or bf16) times the transpose of the
weights ``[N, K]`` whose rows are GGUF blocks, ``raw`` uint8 ``[N, row_bytes]`` exactly as in the
file: ``[..., N]`` in the dtype of ``x``, accumulated in float32.

``quant_norm_matmul(stream, norm, eps, raw, ggml_type, activation, dtype)``: the same product for
the RMS norm of ``stream`` float32 ``[M, K]`` (times ``norm`` float32 ``[K]``), rounded to
``dtype``: ``[M, N]`` in ``dtype``. With an ``activation`` ("silu", "gelu_tanh", else "none") the
first half of the weights' rows are a gate, the second half the up projection: ``act(gate) * up``,
``[M, N / 2]``, rounded once.

``quant_matmul_add(x, raw, ggml_type, stream)``: ``stream`` float32 ``[M, N]`` += the product with
``x [M, K]``, which is not rounded on the way.

``dequantize_rows(raw, rows, ggml_type, dtype)``: rows ``rows`` (int64 ``[T]``, each in
``[0, N)``) of the weights as ``[T, K]`` of ``dtype``: an embedding lookup.

The references dequantise and multiply, a bounded number of rows at a time, on any device.
:mod:`squall.kernels.quant.cpu_native` replaces them on the CPU.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from squall.kernels.activation import gelu_tanh_mul_reference, silu_mul_reference
from squall.kernels.op import op
from squall.kernels.quant.base import gguf_formats
from squall.kernels.rmsnorm import rms_norm_reference

# float32 weights dequantised at a time by the reference: 16 MiB.
_SCRATCH_WEIGHTS = 4 << 20
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"none": lambda y: y, "silu": silu_mul_reference, "gelu_tanh": gelu_tanh_mul_reference}
)


def row_weights(raw: Tensor, ggml_type: int) -> int:
    """Weights in a row of ``raw``. ``ValueError``: not uint8 ``[N, whole blocks]`` of a known
    type."""
    entry = gguf_formats().get(ggml_type)
    if entry is None:
        known = ", ".join(f"{f.ggml_type} ({f.name})" for f in gguf_formats().values())
        raise ValueError(f"unknown GGML type {ggml_type}; accepted: {known}")
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] % entry.block_bytes:
        raise ValueError(
            f"{entry.name} weights are {raw.dtype} {list(raw.shape)}; "
            f"accepted: uint8 [rows, a multiple of {entry.block_bytes}]"
        )
    return raw.shape[1] // entry.block_bytes * entry.block_size


def check_columns(x: Tensor, raw: Tensor, ggml_type: int) -> None:
    """``ValueError`` unless ``x [..., K]`` can be multiplied by ``raw``."""
    weights = row_weights(raw, ggml_type)
    if x.shape[-1:] != (weights,):
        raise ValueError(
            f"x is {list(x.shape)}, the weights have {weights} columns; accepted: [..., {weights}]"
        )


def check_norm_matmul(
    stream: Tensor, norm: Tensor, raw: Tensor, ggml_type: int, activation: str
) -> None:
    """``ValueError`` for arguments that ``quant_norm_matmul`` does not take."""
    check_columns(stream, raw, ggml_type)
    if norm.dtype != torch.float32 or norm.shape != stream.shape[1:]:
        found = f"{norm.dtype} {list(norm.shape)}"
        raise ValueError(f"norm is {found}; accepted: torch.float32 {list(stream.shape[1:])}")
    if stream.dtype != torch.float32 or stream.ndim != 2:
        found = f"{stream.dtype} {list(stream.shape)}"
        raise ValueError(f"stream is {found}; accepted: torch.float32 [M, K]")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; accepted: {', '.join(_ACTIVATIONS)}")
    if activation != "none" and raw.shape[0] % 2:
        raise ValueError(f"{raw.shape[0]} gate and up rows; accepted: an even number")


def check_matmul_add(x: Tensor, raw: Tensor, ggml_type: int, stream: Tensor) -> None:
    """``ValueError`` for arguments that ``quant_matmul_add`` does not take."""
    check_columns(x, raw, ggml_type)
    shape = (*x.shape[:-1], raw.shape[0])
    if stream.dtype != torch.float32 or stream.shape != shape or not stream.is_contiguous():
        found = f"{stream.dtype} {list(stream.shape)}, strides {list(stream.stride())}"
        raise ValueError(f"stream is {found}; accepted: torch.float32 {list(shape)}, dense")


def quant_matmul_reference(x: Tensor, raw: Tensor, ggml_type: int) -> Tensor:
    """Dequantise rows and multiply in float32. Shapes as in the module's docstring."""
    return _product(x, raw, ggml_type, x.dtype)


def quant_norm_matmul_reference(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    raw: Tensor,
    ggml_type: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check_norm_matmul(stream, norm, raw, ggml_type, activation)
    x = rms_norm_reference(stream, norm, eps, dtype)
    return _ACTIVATIONS[activation](_product(x, raw, ggml_type, torch.float32)).to(dtype)


def quant_matmul_add_reference(x: Tensor, raw: Tensor, ggml_type: int, stream: Tensor) -> None:
    check_matmul_add(x, raw, ggml_type, stream)
    stream.add_(_product(x, raw, ggml_type, torch.float32))


def _product(x: Tensor, raw: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    check_columns(x, raw, ggml_type)
    entry = gguf_formats()[ggml_type]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(rows.shape[0], raw.shape[0], dtype=dtype, device=x.device)
    step = max(1, _SCRATCH_WEIGHTS // max(1, x.shape[-1]))
    for start in range(0, raw.shape[0], step):
        weights = entry.dequantize(raw[start : start + step])
        y[:, start : start + step] = rows @ weights.t()
    return y.view(*x.shape[:-1], raw.shape[0])


def dequantize_rows_reference(
    raw: Tensor, rows: Tensor, ggml_type: int, dtype: torch.dtype
) -> Tensor:
    """Gather blocks, then dequantise. Shapes as in the module's docstring."""
    weights = row_weights(raw, ggml_type)
    if not rows.numel():
        return torch.empty(0, weights, dtype=dtype, device=raw.device)
    return gguf_formats()[ggml_type].dequantize(raw[rows]).to(dtype)


def _quant_matmul_fake(x: Tensor, raw: Tensor, ggml_type: int) -> Tensor:
    check_columns(x, raw, ggml_type)
    return x.new_empty(*x.shape[:-1], raw.shape[0])


def _norm_matmul_fake(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    raw: Tensor,
    ggml_type: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check_norm_matmul(stream, norm, raw, ggml_type, activation)
    columns = raw.shape[0] if activation == "none" else raw.shape[0] // 2
    return stream.new_empty(stream.shape[0], columns, dtype=dtype)


def _matmul_add_fake(x: Tensor, raw: Tensor, ggml_type: int, stream: Tensor) -> None:
    check_matmul_add(x, raw, ggml_type, stream)


def _dequantize_rows_fake(raw: Tensor, rows: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    return raw.new_empty(rows.shape[0], row_weights(raw, ggml_type), dtype=dtype)


quant_matmul = op(
    "quant_matmul(Tensor x, Tensor raw, int ggml_type) -> Tensor",
    quant_matmul_reference,
    fake=_quant_matmul_fake,
)
quant_norm_matmul = op(
    "quant_norm_matmul(Tensor stream, Tensor norm, float eps, Tensor raw, int ggml_type, "
    "str activation, ScalarType dtype) -> Tensor",
    quant_norm_matmul_reference,
    fake=_norm_matmul_fake,
)
quant_matmul_add = op(
    "quant_matmul_add(Tensor x, Tensor raw, int ggml_type, Tensor(a!) stream) -> ()",
    quant_matmul_add_reference,
    fake=_matmul_add_fake,
)
dequantize_rows = op(
    "dequantize_rows(Tensor raw, Tensor rows, int ggml_type, ScalarType dtype) -> Tensor",
    dequantize_rows_reference,
    fake=_dequantize_rows_fake,
)
