"""What a weight matrix is to the models: something that multiplies and hands out rows.

A weight is ``[out_features, in_features]`` in PyTorch order. The classes differ in how the
numbers are kept: plain floats, or a GGUF file's own blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from squall.kernels.quant.base import QuantFormat
from squall.kernels.quant.matmul import dequantize_rows, quant_matmul


class Weight(Protocol):
    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def matmul(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in x's dtype."""
        ...

    def matmul_f32(self, x: Tensor) -> Tensor:
        """``x [M, in] -> [M, out]`` float32, the accumulator's own precision."""
        ...

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` (int64 [T]) as ``[T, in]`` of ``dtype``: an embedding lookup."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """Floating-point numbers, ``[out, in]``."""

    data: Tensor

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.data)

    def matmul_f32(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.data.t(), out_dtype=torch.float32)
        return F.linear(x, self.data).float()

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.data[ids].to(dtype)


@dataclass(frozen=True)
class BlockWeight:
    """GGUF blocks as they are in the file: uint8 ``[out, row_bytes]``."""

    format: QuantFormat
    raw: Tensor

    @property
    def out_features(self) -> int:
        return self.raw.shape[0]

    @property
    def in_features(self) -> int:
        return self.raw.shape[1] // self.format.block_bytes * self.format.block_size

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        return quant_matmul(x, self.raw, self.format.ggml_type)

    def matmul_f32(self, x: Tensor) -> Tensor:
        return quant_matmul(x.float(), self.raw, self.format.ggml_type)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize_rows(self.raw, ids, self.format.ggml_type, dtype)


def merge(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Stack weights of one kind along the output, so that one matmul serves all of them;
    weights of different kinds stay as they are."""
    first = weights[0]
    if len(weights) == 1:
        return (first,)
    if all(isinstance(w, DenseWeight) for w in weights):
        return (DenseWeight(torch.cat([w.data for w in weights])),)  # type: ignore[attr-defined]
    if all(isinstance(w, BlockWeight) and w.format == first.format for w in weights):  # type: ignore[attr-defined]
        return (BlockWeight(first.format, torch.cat([w.raw for w in weights])),)  # type: ignore[attr-defined]
    return tuple(weights)
