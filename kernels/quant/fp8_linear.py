"""Products with block-scaled FP8 weights, fused with what surrounds them in a decoder layer.

A weight is ``data, scales, height`` (:mod:`squall.kernels.quant.fp8`); ``x [M, K]`` is f32, f16 or
bf16; ``bias [N]`` may be None; ``stream`` is the float32 residual stream; rows of activations may
be strided. Activations are not quantised, whatever a checkpoint's ``activation_scheme``.

``fp8_linear(x, data, scales, height, bias, dtype)``
    ``x w^T + bias``, ``[M, N]`` in ``dtype``.
``fp8_norm_linear(stream, norm, eps, data, scales, height, bias, activation, rounded, dtype)``
    ``fp8_linear`` of the RMS norm of ``stream`` (times ``norm``, float32 ``[K]``), which is rounded
    to ``rounded``, or, by the GEMV, not at all. With ``activation`` "silu" or "gelu_tanh" w is
    ``[2F, K]``, gate rows and then up rows, and the result ``act(gate) * up`` is ``[M, F]``;
    otherwise "none".
``fp8_linear_add(x, data, scales, height, bias, stream)``
    ``stream [M, N] += x w^T + bias``, in place, without rounding the product.

A GPU has three ways, chosen by the number of rows: a GEMV that fuses everything (``fp8_gemv``, one
row), a tensor-core kernel (``fp8_skinny``, up to 64 rows), and beyond, as for float32 activations,
weights expanded to x's dtype, a bounded number of rows at a time, for the vendor's library.
``tuned("fp8", "n<N>-k<K>-m<bucket of M>")`` decides up to 256 rows.
"""

from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.linear import blas_add
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.op import op
from squall.kernels.quant import fp8_gemv, fp8_skinny
from squall.kernels.quant.fp8 import (
    BLOCK,
    check_weight,
    fp8_expand,
    fp8_expand_reference,
    random_fp8,
)
from squall.kernels.quant.scratch import blas_into
from squall.kernels.rmsnorm import rms_norm, rms_norm_launcher
from squall.kernels.tuning import Config, product_key, row_bucket, tuned

_REFERENCE_WEIGHTS = 4 << 20  # dequantised at a time by the reference: 16 MiB of float32
_SCRATCH_BYTES = 256 << 20  # of weights expanded at a time
EXPAND: Config = MappingProxyType({"expand": 1})
_MAX_UNTUNED_SKINNY = 64

Fp8 = tuple[Tensor, Tensor, int]
"""data, scales, height: the order in which operators take them."""


def _product(x: Tensor, weight: Fp8, bias: Tensor | None) -> Tensor:
    """``x w^T + bias`` in float32, a bounded number of rows of w at a time."""
    (n, k), x = weight[0].shape, x.float()
    y = torch.empty(x.shape[0], n, device=x.device)
    step = max(1, _REFERENCE_WEIGHTS // max(1, k))
    for start in range(0, n, step):
        stop = min(n, start + step)
        y[:, start:stop] = F.linear(x, fp8_expand_reference(*weight, start, stop, torch.float32))
    return y if bias is None else y.add_(bias)


def fp8_linear_reference(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _product(x, (data, scales, height), bias).to(dtype)


def fp8_norm_linear_reference(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    data: Tensor,
    scales: Tensor,
    height: int,
    bias: Tensor | None,
    activation: str,
    rounded: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    x = rms_norm(stream, norm, eps, rounded)
    return ACTIVATIONS[activation](_product(x, (data, scales, height), bias)).to(dtype)


def fp8_linear_add_reference(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, stream: Tensor
) -> None:
    stream.add_(_product(x, (data, scales, height), bias))


def _choose(rows: int, data: Tensor, dtype: torch.dtype) -> Config:
    """How to multiply ``rows`` rows of ``dtype`` (rounded, if they are still to be normalised)."""
    (n, k), bucket = data.shape, row_bucket(rows)
    if dtype == torch.float32 or bucket > fp8_skinny.MAX_ROWS or not fp8_skinny.supports(data):
        return EXPAND
    found = tuned("fp8", product_key(n, k, bucket), data.device)
    if found is not None and ("gemv" not in found or fp8_gemv.supports(data)):
        return found
    if rows == 1 and fp8_gemv.supports(data):
        return fp8_gemv.rule(k)
    if bucket <= _MAX_UNTUNED_SKINNY:
        return fp8_skinny.rule(bucket, n, k, data.device)
    return EXPAND


def _expanded(
    weight: Fp8, dtype: torch.dtype, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
    """The weights as ``[rows, K]`` of ``dtype``, a bounded number of rows at a time, with their
    part of the bias and their columns of the result."""
    n, k = weight[0].shape
    step = max(1, _SCRATCH_BYTES // max(1, k * dtype.itemsize))
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        rows = fp8_expand(*weight, part.start, part.stop, dtype)
        yield rows, None if bias is None else bias[part], part


def multiply(
    x: Tensor, weight: Fp8, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    """``fp8_linear`` in the way that ``config`` says, on a GPU; so are the two below."""
    y = torch.empty((x.shape[0], weight[0].shape[0]), dtype=dtype, device=x.device)
    if "expand" in config:
        for rows, some_bias, columns in _expanded(weight, x.dtype, bias):
            blas_into(x, rows, some_bias, y[:, columns])
    elif "gemv" in config:
        fp8_gemv.gemv(x, weight, Epilogue(y, bias), config)
    else:
        fp8_skinny.skinny(x, weight, Epilogue(y, bias), config)
    return y


def norm_multiply(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    weight: Fp8,
    bias: Tensor | None,
    activation: str,
    rounded: torch.dtype,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    if "gemv" not in config:
        x = rms_norm_launcher(stream, norm, eps, rounded)
        if "expand" in config:
            return ACTIVATIONS[activation](multiply(x, weight, bias, dtype, config))
    features = weight[0].shape[0] // (1 if activation == "none" else 2)
    y = torch.empty((stream.shape[0], features), dtype=dtype, device=stream.device)
    epilogue = Epilogue(y, bias, activation)
    if "gemv" in config:
        fp8_gemv.gemv(stream, weight, epilogue, config, norm, eps)
    else:
        fp8_skinny.skinny(x, weight, epilogue, config)
    return y


def multiply_add(
    x: Tensor, weight: Fp8, bias: Tensor | None, stream: Tensor, config: Config
) -> None:
    if "expand" in config:
        for rows, some_bias, columns in _expanded(weight, x.dtype, bias):
            blas_add(x, rows, some_bias, stream[:, columns])
    elif "gemv" in config:
        fp8_gemv.gemv(x, weight, Epilogue(stream, bias, add=True), config)
    else:
        fp8_skinny.skinny(x, weight, Epilogue(stream, bias, add=True), config)


def fp8_linear_launcher(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    assert dtype in (x.dtype, torch.float32), f"{dtype} of {x.dtype} activations"
    check_weight(data, scales, height)
    if x.shape[0] == 0:
        return _linear_fake(x, data, scales, height, bias, dtype)
    config = _choose(x.shape[0], data, x.dtype)
    return multiply(x, (data, scales, height), bias, dtype, config)


def fp8_norm_linear_launcher(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    data: Tensor,
    scales: Tensor,
    height: int,
    bias: Tensor | None,
    activation: str,
    rounded: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    assert dtype in (rounded, torch.float32), f"{dtype} of {rounded} activations"
    assert activation in ACTIVATIONS, activation
    check_weight(data, scales, height)
    weight = data, scales, height
    if stream.shape[0] == 0:
        return _norm_linear_fake(stream, norm, eps, *weight, bias, activation, rounded, dtype)
    config = _choose(stream.shape[0], data, rounded)
    return norm_multiply(stream, norm, eps, weight, bias, activation, rounded, dtype, config)


def fp8_linear_add_launcher(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, stream: Tensor
) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    check_weight(data, scales, height)
    if x.shape[0]:
        config = _choose(x.shape[0], data, x.dtype)
        multiply_add(x, (data, scales, height), bias, stream, config)


def _linear_fake(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], data.shape[0], dtype=dtype)


def _norm_linear_fake(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    data: Tensor,
    scales: Tensor,
    height: int,
    bias: Tensor | None,
    activation: str,
    rounded: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    features = data.shape[0] // (1 if activation == "none" else 2)
    return stream.new_empty(stream.shape[0], features, dtype=dtype)


def _linear_add_fake(
    x: Tensor, data: Tensor, scales: Tensor, height: int, bias: Tensor | None, stream: Tensor
) -> None:
    return None


_WEIGHT = "Tensor data, Tensor scales, int height, Tensor? bias"
fp8_linear = op(
    f"fp8_linear(Tensor x, {_WEIGHT}, ScalarType dtype) -> Tensor",
    fp8_linear_reference,
    fp8_linear_launcher,
    _linear_fake,
)
fp8_norm_linear = op(
    f"fp8_norm_linear(Tensor stream, Tensor norm, float eps, {_WEIGHT}, str activation,"
    " ScalarType rounded, ScalarType dtype) -> Tensor",
    fp8_norm_linear_reference,
    fp8_norm_linear_launcher,
    _norm_linear_fake,
)
fp8_linear_add = op(
    f"fp8_linear_add(Tensor x, {_WEIGHT}, Tensor(a!) stream) -> ()",
    fp8_linear_add_reference,
    fp8_linear_add_launcher,
    _linear_add_fake,
)


def _inputs(
    n: int, k: int, height: int, bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    cpu = torch.device("cpu")
    data, scales = random_fp8(n, k, height, cpu, torch.Generator().manual_seed(71))
    vector = random((n,), dtype, device, 72) if bias else None
    return data.to(device), scales.to(device), height, vector


def _half(dtype: torch.dtype) -> torch.dtype:
    """Tests of all operators ask for float32 too, which no kernel multiplies."""
    return torch.float16 if dtype == torch.float32 else dtype


def _linear_case(
    size: tuple[int, int, int],
    height: int = BLOCK,
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
    expand: bool = False,
) -> Case:
    """M, N, K; ``expand``: in float32 where the dtype is."""
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        dtype = dtype if expand else _half(dtype)
        x = random((m, k + 16), dtype, device, 73)[:, :k]
        return x, *_inputs(n, k, height, bias, dtype, device), dtype

    title = f"fp8_linear-{m}x{n}x{k}-{height}{'-bias' * bias}{'-expand' * expand}"
    fns = fp8_linear, fp8_linear_reference, fp8_linear_launcher
    return Case(title, *fns, build, aot=aot)


def _norm_case(
    size: tuple[int, int, int],
    activation: str,
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        dtype = _half(dtype)
        stream = random((m, k), torch.float32, device, 74) * 1000
        norm = random((k,), torch.float32, device, 75)
        rows = n if activation == "none" else 2 * n
        weight = _inputs(rows, k, BLOCK, bias, dtype, device)
        return stream, norm, 1e-5, *weight, activation, dtype, dtype

    title = f"fp8_norm_linear-{activation}-{m}x{n}x{k}{'-bias' * bias}"
    fns = fp8_norm_linear, fp8_norm_linear_reference, fp8_norm_linear_launcher
    return Case(title, *fns, build, aot=aot)


def _add_case(
    size: tuple[int, int, int],
    height: int = BLOCK,
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        dtype = _half(dtype)
        x = random((m, k + 16), dtype, device, 76)[:, 16:]
        # Large where weights are rounded, so that float32's limit is about that of x's dtype.
        stream = random((m, n), torch.float32, device, 77) * (1024 if m > 64 else 1)
        return x, *_inputs(n, k, height, bias, dtype, device), stream

    title = f"fp8_linear_add-{m}x{n}x{k}-{height}{'-bias' * bias}"
    fns = fp8_linear_add, fp8_linear_add_reference, fp8_linear_add_launcher
    return Case(title, *fns, build, mutates=(5,), aot=aot)


def _cases() -> Iterator[Case]:
    yield _linear_case((1, 34, 2048), aot=BF16)
    yield _linear_case((1, 300, 400), height=32, bias=True)
    yield _linear_case((1, 150, 200))  # rows of no whole chunks
    yield _linear_case((16, 140, 1024), aot=(torch.bfloat16, torch.float16))
    yield _linear_case((5, 7, 330), height=1, bias=True)
    yield _linear_case((64, 130, 256), height=64)
    yield _linear_case((80, 33, 200), bias=True, expand=True)
    yield _linear_case((3, 33, 200), expand=True)
    yield _linear_case((0, 8, 16))
    for activation in ("none", "silu", "gelu_tanh"):
        yield _norm_case((1, 20, 1024), activation, aot=BOTH)
        yield _norm_case((1, 65, 7168), activation, bias=True)
        yield _norm_case((12, 70, 384), activation, bias=True, aot=BF16)
        yield _norm_case((70, 9, 136), activation)
        yield _norm_case((0, 4, 16), activation)
    yield _add_case((1, 34, 2048), aot=BF16)
    yield _add_case((1, 9, 528), height=2, bias=True)
    yield _add_case((8, 96, 1280), aot=BF16)
    yield _add_case((33, 65, 600), height=16, bias=True)
    yield _add_case((90, 24, 40), bias=True)
    yield _add_case((0, 8, 16))


CASES = tuple(_cases())
