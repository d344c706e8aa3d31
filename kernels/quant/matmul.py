"""Products with weights that stay in their file's blocks, and rows taken out of them.

``quant_matmul(x, raw, ggml_type)``: ``x [..., K]`` (f32, f16 or bf16) times the transpose of the
weights ``[N, K]`` whose rows are GGUF blocks, ``raw`` uint8 ``[N, row_bytes]`` exactly as in the
file: ``[..., N]`` in the dtype of ``x``, accumulated in float32.

``dequantize_rows(raw, rows, ggml_type, dtype)``: rows ``rows`` (int64 ``[T]``, each in
``[0, N)``) of the weights as ``[T, K]`` of ``dtype``: an embedding lookup.

The references dequantise and multiply, a bounded number of rows at a time, on any device.
:mod:`squall.kernels.quant.cpu_native` replaces them on the CPU.
"""

import torch
from torch import Tensor

from squall.kernels.op import op
from squall.kernels.quant.base import gguf_formats

# float32 weights dequantised at a time by the reference: 16 MiB.
_SCRATCH_WEIGHTS = 4 << 20


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


def quant_matmul_reference(x: Tensor, raw: Tensor, ggml_type: int) -> Tensor:
    """Dequantise rows and multiply in float32. Shapes as in the module's docstring."""
    check_columns(x, raw, ggml_type)
    entry = gguf_formats()[ggml_type]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(rows.shape[0], raw.shape[0], dtype=x.dtype, device=x.device)
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


def _dequantize_rows_fake(raw: Tensor, rows: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    return raw.new_empty(rows.shape[0], row_weights(raw, ggml_type), dtype=dtype)


quant_matmul = op(
    "quant_matmul(Tensor x, Tensor raw, int ggml_type) -> Tensor",
    quant_matmul_reference,
    fake=_quant_matmul_fake,
)
dequantize_rows = op(
    "dequantize_rows(Tensor raw, Tensor rows, int ggml_type, ScalarType dtype) -> Tensor",
    dequantize_rows_reference,
    fake=_dequantize_rows_fake,
)
