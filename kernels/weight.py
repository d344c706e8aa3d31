"""What a weight matrix is to the models: something that multiplies and hands out rows.

A weight is ``[out_features, in_features]`` in PyTorch order. The classes differ in how the numbers
are kept: plain floats (``DenseWeight``), a GGUF file's own blocks (``BlockWeight``: CPUs), those
blocks repacked for a GPU (``squall.kernels.quant.plane_weight``), or block-scaled FP8
(``squall.kernels.quant.fp8_weight``). They multiply in the three ways a decoder layer needs, each
one call, so that a device can fuse what surrounds a product with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.linear import linear, linear_add, norm_linear
from squall.kernels.quant.base import QuantFormat
from squall.kernels.quant.fp8_weight import Fp8Weight, merge_fp8
from squall.kernels.quant.matmul import (
    dequantize_rows,
    quant_matmul,
    quant_matmul_add,
    quant_norm_matmul,
)
from squall.kernels.quant.plane_weight import PlaneStack, PlaneWeight
from squall.kernels.quant.planes import concat, pack
from squall.kernels.rmsnorm import rms_norm


class Weight(Protocol):
    """Activations are ``[M, in]``; ``stream`` is the float32 residual stream."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``x W^T + bias``, ``[M, out]`` in ``dtype``."""
        ...

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """``linear`` of the RMS norm of ``stream`` (times ``norm``, float32 ``[in]``).

        ``activation`` is "none", or "silu" or "gelu_tanh" for weights whose first half are gate
        rows and whose second half are up rows: ``act(gate) * up``, ``[M, out / 2]``.
        """
        ...

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        """Add ``x W^T + bias`` to ``stream`` ``[M, out]``, in place, without rounding it."""
        ...

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` (int32 or int64 [T]) as ``[T, in]`` of ``dtype``: an embedding lookup."""
        ...

    def select(self, ids: Tensor) -> "Weight":
        """The weight of rows ``ids`` (int64 [N])."""
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

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return linear(x, self.data, bias, dtype)

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        return norm_linear(stream, norm, eps, self.data, bias, activation, dtype)

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        linear_add(x, self.data, bias, stream)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.data.index_select(0, ids).to(dtype)

    def select(self, ids: Tensor) -> "DenseWeight":
        return DenseWeight(self.data.index_select(0, ids))


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

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = quant_matmul(x, self.raw, self.format.ggml_type)
        return _biased(y, bias).to(dtype)

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        fused = activation if bias is None else "none"
        y = quant_norm_matmul(stream, norm, eps, self.raw, self.format.ggml_type, fused, dtype)
        return y if bias is None else ACTIVATIONS[activation](_biased(y, bias))

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        quant_matmul_add(x, self.raw, self.format.ggml_type, stream)
        _biased(stream, bias)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize_rows(self.raw, ids.long(), self.format.ggml_type, dtype)

    def select(self, ids: Tensor) -> "BlockWeight":
        return BlockWeight(self.format, self.raw.index_select(0, ids))


@dataclass(frozen=True)
class Stack:
    """Weights of several kinds side by side along the output: q and k of one, v of another."""

    parts: tuple[Weight, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _biased(torch.cat([part.linear(x, None, dtype) for part in self.parts], -1), bias)

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        x = rms_norm(stream, norm, eps, dtype)
        return ACTIVATIONS[activation](self.linear(x, bias, dtype))

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        stream += self.linear(x, bias, torch.float32)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise TypeError("an embedding is one matrix")

    def select(self, ids: Tensor) -> Weight:
        raise TypeError("rows are selected before weights are stacked")


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)


def place(weight: BlockWeight, dtype: torch.dtype) -> Weight:
    """The form in which a weight that was just put on its device is kept there; ``dtype`` is the
    model's."""
    if weight.raw.device.type in ("cuda", "xpu"):
        return PlaneWeight(pack(weight.format, weight.raw), dtype)
    return weight


def merge(weights: Sequence[Weight]) -> Weight:
    """Stack weights along the output, so that one product serves all of them."""
    if len(weights) == 1:
        return weights[0]
    dense = [w for w in weights if isinstance(w, DenseWeight)]
    if len(dense) == len(weights):
        return DenseWeight(torch.cat([w.data for w in dense]))
    blocks = [w for w in weights if isinstance(w, BlockWeight)]
    if len(blocks) == len(weights) and len({w.format.ggml_type for w in blocks}) == 1:
        return BlockWeight(blocks[0].format, torch.cat([w.raw for w in blocks]))
    planes = [w for w in weights if isinstance(w, PlaneWeight)]
    if len(planes) == len(weights):
        return _merge_planes(planes)
    fp8 = [w for w in weights if isinstance(w, Fp8Weight)]
    if len(fp8) == len(weights):
        return merge_fp8(fp8)
    return Stack(tuple(weights))


def _merge_planes(weights: Sequence[PlaneWeight]) -> Weight:
    """Neighbours of one type become one weight; what is left differs in type."""
    runs: list[list[PlaneWeight]] = []
    for weight in weights:
        if runs and runs[-1][0].planes.format == weight.planes.format:
            runs[-1].append(weight)
        else:
            runs.append([weight])
    dtype = weights[0].dtype
    merged = tuple(PlaneWeight(concat([w.planes for w in run]), dtype) for run in runs)
    return merged[0] if len(merged) == 1 else PlaneStack(merged)
