"""The experts of a layer, as the models see them.

As with :mod:`squall.kernels.weight`, classes differ in how numbers are kept: plain floats, FP8 with
scales by block, a GGUF file's blocks (CPUs), or these repacked for a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.moe.dense import add_experts, dense_experts
from squall.kernels.moe.fp8 import fp8_experts
from squall.kernels.moe.planes import plane_experts
from squall.kernels.quant.base import QuantFormat
from squall.kernels.quant.matmul import quant_matmul
from squall.kernels.quant.planes import Planes, pack
from squall.kernels.rmsnorm import rms_norm


@dataclass(frozen=True)
class Routed:
    """Tokens on their way to their experts: ``x [T, D]``, or with ``norm`` (float32 ``[D]``) and
    ``eps`` the float32 stream that its RMS norm is still to be taken of; ``ids`` int32 and
    ``weights`` float32 ``[T, k]``."""

    x: Tensor
    norm: Tensor | None
    eps: float
    ids: Tensor
    weights: Tensor


class Experts(Protocol):
    @property
    def nbytes(self) -> int: ...

    def add_to(self, stream: Tensor, routed: Routed, activation: str) -> None:
        """Add ``sum of weight * down(act(gate_up(x)))`` over a token's experts to ``stream``,
        float32 ``[T, D]``, in place."""
        ...


@dataclass(frozen=True)
class DenseExperts:
    """Floating-point numbers: ``gate_up [E, 2 I, D]``, ``down [E, D, I]`` and their biases."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def add_to(self, stream: Tensor, routed: Routed, activation: str) -> None:
        weights = self.gate_up, self.gate_up_bias, self.down, self.down_bias
        source = routed.x, routed.norm, routed.eps
        dense_experts(*source, *weights, routed.ids, routed.weights, activation, stream)


@dataclass(frozen=True)
class Fp8Experts:
    """FP8 codes and scales of :mod:`squall.kernels.moe.fp8`; ``dtype`` is the model's."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        tensors = self.gate_up, self.gate_up_scales, self.down, self.down_scales
        return sum(tensor.nbytes for tensor in tensors)

    def add_to(self, stream: Tensor, routed: Routed, activation: str) -> None:
        fp8_experts(
            routed.x,
            routed.norm,
            routed.eps,
            self.gate_up,
            self.gate_up_scales,
            self.down,
            self.down_scales,
            routed.ids,
            routed.weights,
            activation,
            self.dtype,
            stream,
        )


Blocks = tuple[QuantFormat, Tensor]
"""GGUF blocks as they are in the file: a format and uint8 ``[experts, rows, row_bytes]``."""


@dataclass(frozen=True)
class BlockExperts:
    """Blocks of gate and of up, or of both as one, and of down; ``dtype`` is the model's."""

    gate_up: tuple[Blocks, ...]
    gate_up_bias: Tensor | None
    down: Blocks
    down_bias: Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(raw.nbytes for _, raw in (*self.gate_up, self.down))

    def add_to(self, stream: Tensor, routed: Routed, activation: str) -> None:
        x = routed.x
        if routed.norm is not None:
            x = rms_norm(x, routed.norm, routed.eps, self.dtype)

        def up(some: Tensor, expert: int) -> Tensor:
            y = torch.cat([_product(some, blocks, expert) for blocks in self.gate_up], 1)
            return ACTIVATIONS[activation](_biased(y, self.gate_up_bias, expert))

        def down(some: Tensor, expert: int) -> Tensor:
            return _biased(_product(some, self.down, expert), self.down_bias, expert)

        add_experts(x, routed.ids, routed.weights, up, down, stream)


def _product(x: Tensor, blocks: Blocks, expert: int) -> Tensor:
    form, raw = blocks
    return quant_matmul(x, raw[expert], form.ggml_type)


def _biased(y: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return y if bias is None else y.add_(bias[expert])


@dataclass(frozen=True)
class PlaneExperts:
    """The blocks repacked for a GPU (:mod:`squall.kernels.moe.planes`)."""

    gate_up: tuple[Planes, ...]
    gate_up_bias: Tensor | None
    down: Planes
    down_bias: Tensor | None
    experts: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(planes.nbytes for planes in (*self.gate_up, self.down))

    def add_to(self, stream: Tensor, routed: Routed, activation: str) -> None:
        plane_experts(
            routed.x,
            routed.norm,
            routed.eps,
            [tensor for planes in self.gate_up for tensor in planes.tensors],
            [planes.format.ggml_type for planes in self.gate_up],
            self.gate_up_bias,
            list(self.down.tensors),
            self.down.format.ggml_type,
            self.down_bias,
            routed.ids,
            routed.weights,
            self.experts,
            activation,
            self.dtype,
            stream,
        )


def place_experts(experts: BlockExperts) -> Experts:
    """The form in which experts whose blocks were just put on their device are kept there."""
    if experts.down[1].device.type not in ("cuda", "xpu"):
        return experts
    return PlaneExperts(
        tuple(_packed(blocks) for blocks in _merged(experts.gate_up)),
        experts.gate_up_bias,
        _packed(experts.down),
        experts.down_bias,
        experts.down[1].shape[0],
        experts.dtype,
    )


def _merged(parts: Sequence[Blocks]) -> Sequence[Blocks]:
    """Parts of one format, one below the other in every expert."""
    if len({form.name for form, _ in parts}) > 1:
        return parts
    return [(parts[0][0], torch.cat([raw for _, raw in parts], 1))]


def _packed(blocks: Blocks) -> Planes:
    form, raw = blocks
    return pack(form, raw.flatten(0, 1))
