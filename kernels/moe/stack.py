"""The weights of a layer's experts: one matrix ``[out, in]`` for each, multiplied together.

As with :mod:`squall.kernels.weight`, classes differ in how numbers are kept: plain floats, or a
GGUF file's blocks (CPUs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.linear_gemv import supports as gemv_supports
from squall.kernels.moe.dense import by_expert, expert_linear
from squall.kernels.moe.sort import Tiles, block_for, sort_pairs
from squall.kernels.quant.base import QuantFormat
from squall.kernels.quant.matmul import quant_matmul

NO_TILES = (None, None, None, 0)


@dataclass(frozen=True)
class Routing:
    """Where tokens go: ``ids`` int32 and ``weights`` float32 ``[T, k]``, of ``experts``."""

    ids: Tensor
    weights: Tensor
    experts: int

    @property
    def pairs(self) -> Tensor:
        """The experts of all tokens, int32 ``[T * k]``."""
        return self.ids.view(-1)

    @cached_property
    def tiles(self) -> Tiles:
        """The pairs sorted by expert, once for all products."""
        return sort_pairs(self.pairs, self.experts, block_for(self.ids.numel(), self.experts))


class ExpertStack(Protocol):
    """Activations are ``[T, in]``, or ``[T * k, in]`` with a row for every pair."""

    @property
    def nbytes(self) -> int: ...

    def multiply(self, x: Tensor, routing: Routing, bias: Tensor | None, activation: str) -> Tensor:
        """``act(x W^T + bias)`` of every pair's expert, ``[T * k, out]`` in x's dtype, or
        ``[T * k, out / 2]`` with an activation other than "none"; ``bias [experts, out]``."""
        ...


@dataclass(frozen=True)
class DenseStack:
    """Floating-point numbers, ``[experts, out, in]``."""

    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def multiply(self, x: Tensor, routing: Routing, bias: Tensor | None, activation: str) -> Tensor:
        tiles = NO_TILES if self._unsorted(x, routing) else routing.tiles
        return expert_linear(x, self.data, bias, routing.pairs, *tiles, activation)

    def _unsorted(self, x: Tensor, routing: Routing) -> bool:
        if x.device.type not in ("cuda", "xpu"):
            return True
        return routing.ids.shape[0] <= 1 and (x.shape[0] == 0 or gemv_supports(self.data[0]))


@dataclass(frozen=True)
class BlockStack:
    """GGUF blocks as they are in the file: for each part of the output, gate and up for example,
    a format and uint8 ``[experts, rows, row_bytes]``."""

    parts: tuple[tuple[QuantFormat, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(raw.nbytes for _, raw in self.parts)

    def multiply(self, x: Tensor, routing: Routing, bias: Tensor | None, activation: str) -> Tensor:
        def product(some: Tensor, expert: int) -> Tensor:
            ys = [quant_matmul(some, raw[expert], form.ggml_type) for form, raw in self.parts]
            y = torch.cat(ys, -1)
            y = y if bias is None else y.add_(bias[expert])
            return ACTIVATIONS[activation](y).to(x.dtype)

        rows = sum(raw.shape[1] for _, raw in self.parts)
        return by_expert(x, routing.pairs, rows // (1 + (activation != "none")), product)


def stack_dense(parts: Sequence[Tensor]) -> DenseStack:
    """Parts of the output ``[experts, rows, in]``, one below the other in every expert."""
    return DenseStack(parts[0] if len(parts) == 1 else torch.cat(list(parts), 1))


def place_experts(stack: BlockStack, dtype: torch.dtype) -> ExpertStack:
    """The form in which experts that were just put on their device are kept there; ``dtype`` is the
    model's."""
    return stack
