"""Block-scaled FP8 weights as the models see them (:class:`squall.kernels.weight.Weight`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from squall.kernels.quant.fp8 import BLOCK, check_weight, fp8_rows
from squall.kernels.quant.fp8_linear import fp8_linear, fp8_linear_add, fp8_norm_linear


@dataclass(frozen=True)
class Fp8Weight:
    """One matrix as in :mod:`squall.kernels.quant.fp8`: uint8 ``data [N, K]``, float32 ``scales``
    of ``height`` rows each; normalised activations are rounded to ``dtype``, the model's."""

    data: Tensor
    scales: Tensor
    dtype: torch.dtype
    height: int = BLOCK

    def __post_init__(self) -> None:
        check_weight(self.data, self.scales, self.height)

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return fp8_linear(x, self.data, self.scales, self.height, bias, dtype)

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        weight = self.data, self.scales, self.height
        return fp8_norm_linear(stream, norm, eps, *weight, bias, activation, self.dtype, dtype)

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        fp8_linear_add(x, self.data, self.scales, self.height, bias, stream)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8_rows(self.data, self.scales, self.height, ids, dtype)

    def select(self, ids: Tensor) -> "Fp8Weight":
        """The weight of rows ``ids`` (int64 [N]). In any order they are no blocks any more: each
        gets scales of its own, 3% more memory."""
        scales = self.scales[ids // self.height]
        return Fp8Weight(self.data[ids], scales, self.dtype, height=1)

    def lowered(self, height: int) -> Tensor:
        """Scales for blocks of ``height`` rows, which divides this weight's."""
        scales = self.scales.repeat_interleave(self.height // height, 0)
        return scales[: -(-self.out_features // height)]


def merge_fp8(weights: Sequence[Fp8Weight]) -> Fp8Weight:
    """Stack weights along the output. Where one ends within a block, blocks are cut to the largest
    height at which all of them begin, and scales repeated."""
    *starts, _ = accumulate(weight.out_features for weight in weights)
    height = math.gcd(*(weight.height for weight in weights), *starts)
    data = torch.cat([weight.data for weight in weights])
    scales = torch.cat([weight.lowered(height) for weight in weights])
    return Fp8Weight(data, scales, weights[0].dtype, height)
