"""Quantised weights of a GPU, as the models see them (:class:`squall.kernels.weight.Weight`).

Three ways to multiply, by the number of rows M of the activations:

    "gemv"  M = 1       byte products of 16-bit activations with the planes; float32: M <= 8
    "gemm"  M <= 256    tensor cores, weights dequantised in registers; not for float32 activations
    "blas"  the rest    weights expanded to the activations' dtype, then the vendor's library

``tuned("plane_crossover", "<type>-n<N>-k<K>-m<M rounded up to a power of two>")`` names another
way, as ``{way: 1}``, where that is faster.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle

import torch
from torch import Tensor

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.lang import next_power_of_2
from squall.kernels.linear import blas_add
from squall.kernels.quant import gemm, gemv
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.expand import expand_planes, plane_rows
from squall.kernels.quant.planes import Planes, layout, padded, random_planes, tuning_key
from squall.kernels.quant.scratch import blas_into
from squall.kernels.rmsnorm import rms_norm
from squall.kernels.tuning import Config, Problem, Tunable, tuned

_SCRATCH_BYTES = 256 << 20  # of weights expanded at a time


def _possible(rows: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Ways to multiply this many rows, the one to prefer untuned first."""
    if dtype == torch.float32:
        return ("gemv", "blas") if rows <= gemv.MAX_ROWS else ("blas",)
    if rows <= 1:
        return ("gemv", "gemm", "blas")
    return ("gemm", "blas") if rows <= gemm.MAX_ROWS else ("blas",)


class _Input:
    """Activations ``x [M, K]``, or with ``norm`` the residual stream, float32, still to be
    normalised and rounded to ``dtype``: by the GEMV itself, or once for all others."""

    def __init__(
        self, x: Tensor, dtype: torch.dtype, norm: Tensor | None = None, eps: float = 0.0
    ) -> None:
        self.x, self.norm, self.eps = x, norm, eps
        self.rows, self.dtype = x.shape[0], dtype

    @cached_property
    def dense(self) -> Tensor:
        if self.norm is None:
            return self.x
        return rms_norm(self.x, self.norm, self.eps, self.dtype)


@dataclass(frozen=True)
class PlaneWeight:
    """One matrix in planes; normalised activations are rounded to ``dtype``, the model's."""

    planes: Planes
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        return self.planes.out_features

    @property
    def in_features(self) -> int:
        return self.planes.in_features

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``x W^T + bias``, ``[M, N]`` of ``dtype``."""
        y = x.new_empty((x.shape[0], self.out_features), dtype=dtype)
        self.multiply(_Input(x, x.dtype), bias, y)
        return y

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """``act(rms_norm(stream) W^T + bias)`` of ``dtype``: ``[M, N]``, or ``[M, N / 2]``."""
        x = _Input(stream, self.dtype, norm, eps)
        way = self.way(x)
        fused = way != "blas"
        features = self.out_features // (2 if fused and activation != "none" else 1)
        y = stream.new_empty((x.rows, features), dtype=dtype)
        self.multiply(x, bias, y, activation if fused else "none", way)
        return y if fused else ACTIVATIONS[activation](y)

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        """``stream += x W^T + bias``, float32 ``[M, N]``."""
        self.multiply_add(_Input(x, x.dtype), bias, stream)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` (int32 or int64 ``[T]``) as ``[T, K]`` of ``dtype``."""
        kind = self.planes.format.ggml_type
        return plane_rows(*self.planes.tensors, kind, self.in_features, ids, dtype)

    def select(self, ids: Tensor) -> "PlaneWeight":
        """The weight of rows ``ids`` (int64 [N])."""
        return PlaneWeight(self.planes.select(ids), self.dtype)

    def multiply(
        self,
        x: _Input,
        bias: Tensor | None,
        out: Tensor,
        activation: str = "none",
        way: str | None = None,
    ) -> None:
        """Write the product into ``out``, whose rows may be strided; "blas" has no activation.

        ``way`` overrides the choice.
        """
        way, kind = way or self.way(x), self.planes.format.ggml_type
        if way == "gemv":
            source = x.x, x.norm, x.eps
            gemv.plane_gemv(*source, *self.planes.tensors, kind, bias, activation, out)
        elif way == "gemm":
            gemm.plane_gemm(x.dense, *self.planes.tensors, kind, bias, activation, out)
        else:
            assert activation == "none", activation
            for weight, some_bias, columns in self._expanded(x.dense.dtype, bias, out):
                blas_into(x.dense, weight, some_bias, columns)

    def multiply_add(
        self, x: _Input, bias: Tensor | None, stream: Tensor, way: str | None = None
    ) -> None:
        """Add the product to ``stream``, whose rows may be strided; ``way`` as in multiply."""
        way, kind = way or self.way(x), self.planes.format.ggml_type
        if way == "gemv":
            gemv.plane_gemv_add(x.x, *self.planes.tensors, kind, bias, stream)
        elif way == "gemm":
            gemm.plane_gemm_add(x.dense, *self.planes.tensors, kind, bias, stream)
        else:
            for weight, some_bias, columns in self._expanded(x.dense.dtype, bias, stream):
                blas_add(x.dense, weight, some_bias, columns)

    def way(self, x: _Input) -> str:
        """The way that the table names, or else the first possible one."""
        possible = _possible(x.rows, x.dtype)
        bucket = next_power_of_2(max(1, x.rows))
        kind, n, k = self.planes.format.ggml_type, self.out_features, self.planes.padded
        found = tuned("plane_crossover", tuning_key(kind, n, k, bucket), self.planes.low.device)
        return next((way for way in possible if found and way in found), possible[0])

    def _expanded(
        self, dtype: torch.dtype, bias: Tensor | None, out: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """The weights as ``[rows, K]`` of ``dtype``, a bounded number of rows at a time, with their
        part of the bias and their columns of ``out``."""
        planes = self.planes
        kind, k, n = planes.format.ggml_type, planes.in_features, planes.out_features
        step = max(1, _SCRATCH_BYTES // (k * dtype.itemsize))
        if n <= step:
            yield expand_planes(*planes.tensors, kind, k, dtype), bias, out
            return
        for start in range(0, n, step):
            part = slice(start, start + step)
            some = [None if t is None else t[part] for t in planes.tensors]
            weight = expand_planes(*some, kind, k, dtype)
            yield weight, None if bias is None else bias[part], out[:, part]


@dataclass(frozen=True)
class PlaneStack:
    """Matrices of several types side by side along N: q and k of one type, v of another.

    Activations are made once, and every part writes its own columns of one result; two parts are
    multiplied side by side.
    """

    parts: tuple[PlaneWeight, ...]

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
        """As :meth:`PlaneWeight.linear`."""
        return self._multiply(_Input(x, x.dtype), bias, x, dtype)

    def norm_linear(
        self,
        stream: Tensor,
        norm: Tensor,
        eps: float,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """As :meth:`PlaneWeight.norm_linear`."""
        x = _Input(stream, self.parts[0].dtype, norm, eps)
        y = self._multiply(x, bias, stream, dtype)
        return ACTIVATIONS[activation](y)

    def linear_add(self, x: Tensor, bias: Tensor | None, stream: Tensor) -> None:
        """As :meth:`PlaneWeight.linear_add`."""
        source = _Input(x, x.dtype)
        for part, place in self._places():
            part.multiply_add(source, None if bias is None else bias[place], stream[:, place])

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise TypeError("an embedding is one matrix")

    def select(self, ids: Tensor) -> "PlaneStack":
        raise TypeError("rows are selected before weights are stacked")

    def _multiply(
        self, source: _Input, bias: Tensor | None, like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        y = like.new_empty((source.rows, self.out_features), dtype=dtype)
        ways = {part.way(source) for part in self.parts}
        if len(self.parts) == 2 and ways in ({"gemv"}, {"gemm"}):
            self._multiply_pair(source, ways.pop(), bias, y)
            return y
        for part, place in self._places():
            part.multiply(source, None if bias is None else bias[place], y[:, place])
        return y

    def _multiply_pair(self, source: _Input, way: str, bias: Tensor | None, out: Tensor) -> None:
        """Both parts side by side, ``way`` "gemv" or "gemm"."""
        pair = [t for p in self.parts for t in (p.planes.tensors, p.planes.format.ggml_type)]
        if way == "gemv":
            gemv.plane_gemv_pair(source.x, source.norm, source.eps, *pair, bias, out)
        else:
            gemm.plane_gemm_pair(source.dense, *pair, bias, out)

    def _places(self) -> Iterator[tuple[PlaneWeight, slice]]:
        """Every part with its columns."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.out_features)
            start += part.out_features


def _runner(
    ggml_type: int, n: int, k: int, rows: int, device: torch.device
) -> Callable[[Config], None]:
    """One product, activations made ready included; what for follows from the size, as for
    :mod:`squall.kernels.quant.gemv`."""
    entry, generator = gguf_formats()[ggml_type], torch.Generator(device).manual_seed(0)
    first = random_planes(entry, n, k, device, generator)
    copies = [replace(first, low=first.low.clone()) for _ in range((256 << 20) // first.nbytes)]
    weights = cycle([PlaneWeight(planes, torch.bfloat16) for planes in (first, *copies)])
    stream, norm = torch.randn((rows, k), device=device), torch.ones(k, device=device)
    x = stream.bfloat16()
    add, gated = n <= k, 4 * k <= n <= 65536
    full = torch.zeros((rows, n), device=device, dtype=torch.float32 if add else x.dtype)
    half = full[:, : n // 2]

    def run(config: Config) -> None:
        weight, (way,) = next(weights), config
        if add:
            weight.multiply_add(_Input(x, x.dtype), None, full, way)
        elif gated and way != "blas":
            weight.multiply(_Input(stream, x.dtype, norm, 1e-5), None, half, "silu", way)
        else:
            weight.multiply(_Input(stream, x.dtype, norm, 1e-5), None, full, "none", way)
            if gated:
                ACTIVATIONS["silu"](full)

    return run


def _problems(shapes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """Sizes at which more than one way may win; tune the ways themselves first."""
    for name in ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0"):
        kind = next(e.ggml_type for e in gguf_formats().values() if e.name == name)
        for n, k in shapes:
            nbytes = int(n * padded(k) * layout(kind).bits / 8)
            for bucket in (64, 128, 256):
                ways = _possible(bucket, torch.bfloat16)
                build = partial(_runner, kind, n, k, bucket)
                candidates = tuple({way: 1} for way in ways)
                yield Problem(tuning_key(kind, n, k, bucket), nbytes, build, candidates)


TUNABLE = Tunable("plane_crossover", _problems)
