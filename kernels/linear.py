"""Products with dense weights, fused with what surrounds them in a decoder layer.

``w`` is ``[N, K]``, f32, f16 or bf16, rows dense; ``x [M, K]`` has its dtype; ``bias [N]`` may be
None; ``stream`` is the float32 residual stream; rows of activations may be strided.

``linear(x, w, bias, dtype)``
    ``x w^T + bias``, ``[M, N]`` in ``dtype``: that of w, or float32, which is what sums are
    computed in (logits).
``norm_linear(stream, norm, eps, w, bias, activation, dtype)``
    ``linear`` of ``x = stream / sqrt(mean(stream^2) + eps) * norm`` (``stream [M, K]``, ``norm``
    float32 ``[K]``). x is rounded to the dtype of w, or, by the GEMV, not at all. With
    ``activation`` "silu" or "gelu_tanh", w is ``[2F, K]``, gate rows and then up rows, and the
    result ``act(gate) * up`` is ``[M, F]`` (Shazeer 2020, arXiv:2002.05202); otherwise "none".
``linear_add(x, w, bias, stream)``
    ``stream [M, N] += x w^T + bias``, in place, without rounding the product.

A GPU has four ways, chosen by the number of rows M, which bounds what can be gained: a GEMV that
fuses everything (``linear_gemv``, one row), a tensor-core kernel that runs at memory speed
(``linear_skinny``, up to 64 rows), one for Hopper that fuses as much and shares more of its reads
(``linear_gemm``), and the vendor's library. ``tuned("linear", "n<N>-k<K>-m<bucket of M>")`` decides
up to 256 rows; without it, and above, the library has what is beyond 64 rows. float32 weights go to
the library, without TF32.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels import linear_gemm, linear_gemv, linear_skinny
from squall.kernels.activation import (
    ACTIVATIONS,
    gelu_tanh_mul_launcher,
    silu_mul_launcher,
)
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.op import op
from squall.kernels.rmsnorm import rms_norm, rms_norm_launcher
from squall.kernels.tuning import Config, Problem, Tunable, product_key, row_bucket, tuned

_SCRATCH_WEIGHTS = 4 << 20  # converted to float32 at a time: 16 MiB
_CUBLAS: Config = MappingProxyType({"cublas": 1})
_MAX_UNTUNED_SKINNY = 64
# Before, addmm wants its addend in the dtype of the factors. Compared once: each comparison of
# versions takes as long as a product's launch.
_ADDS_FLOAT32 = torch.__version__ >= "2.10"

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"none": lambda y: y, "silu": silu_mul_launcher, "gelu_tanh": gelu_tanh_mul_launcher}
)


def linear_reference(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[M, N]`` of ``dtype``, dense."""
    if dtype == w.dtype:
        return F.linear(x, w, bias if bias is None else bias.to(dtype))
    assert dtype == torch.float32, f"{dtype} of {w.dtype} weights"
    y = _float_product(x, w)
    return y if bias is None else y.add_(bias)


def norm_linear_reference(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``[M, N]``, or ``[M, N / 2]`` with an activation, of ``dtype``, dense."""
    x = rms_norm(stream, norm, eps, w.dtype)
    return ACTIVATIONS[activation](linear_reference(x, w, bias, dtype))


def linear_add_reference(x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor) -> None:
    if w.dtype == torch.float32:
        stream.addmm_(x, w.t())
    else:
        stream.add_(_float_product(x, w))
    if bias is not None:
        stream.add_(bias)


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T``, never rounded below float32, with a bounded part of w converted at a time."""
    if w.dtype == torch.float32:
        return F.linear(x, w)
    y = torch.empty(x.shape[0], w.shape[0], device=x.device)
    x = x.float()
    step = max(1, _SCRATCH_WEIGHTS // max(1, w.shape[1]))
    for start in range(0, w.shape[0], step):
        y[:, start : start + step] = F.linear(x, w[start : start + step].float())
    return y


def blas(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``linear`` by the vendor's library."""
    if dtype == w.dtype or not x.is_cuda:
        return linear_reference(x, w, bias, dtype)
    y = torch.mm(x, w.t(), out_dtype=dtype)
    return y if bias is None else y.add_(bias)


def blas_add(x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor) -> None:
    """``linear_add`` by the vendor's library, the addition in its epilogue."""
    if w.dtype == torch.float32 or not x.is_cuda:
        linear_add_reference(x, w, bias, stream)
        return
    if _ADDS_FLOAT32:
        torch.addmm(stream, x, w.t(), out_dtype=torch.float32, out=stream)
    else:
        stream.add_(torch.mm(x, w.t(), out_dtype=torch.float32))
    if bias is not None:
        stream.add_(bias)


def _choose(rows: int, w: Tensor, gated: bool) -> Config:
    """How to multiply ``rows`` rows with ``w``."""
    (n, k), bucket = w.shape, row_bucket(rows)
    if w.dtype == torch.float32 or bucket > linear_skinny.MAX_ROWS:
        return _CUBLAS
    found = tuned("linear", product_key(n, k, bucket), w.device)
    if found and "gemm" in found and not linear_gemm.supports(w, gated, found["split"]):
        found = None
    # The table does not say what a weight is for: a tile of one row has no gate and up.
    if found is not None and not (gated and found.get("rows", 2) < 2):
        return found
    if rows == 1 and linear_gemv.supports(w):
        return linear_gemv.rule(k)
    if bucket <= _MAX_UNTUNED_SKINNY:
        return linear_skinny.rule(n // 2 if gated else n, k, gated, w.device)
    return _CUBLAS


def _fused(x: Tensor, w: Tensor, epilogue: Epilogue, config: Config) -> None:
    if "gemv" in config:
        linear_gemv.gemv(x, w, epilogue, config)
    elif "gemm" in config:
        linear_gemm.gemm(x, w, epilogue, config)
    else:
        linear_skinny.skinny(x, w, epilogue, config)


def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    if "cublas" in config:
        return blas(x, w, bias, dtype)
    y = torch.empty((x.shape[0], w.shape[0]), dtype=dtype, device=x.device)
    _fused(x, w, Epilogue(y, bias), config)
    return y


def _norm_linear(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    if "gemv" not in config:
        x = rms_norm_launcher(stream, norm, eps, w.dtype)
        if "cublas" in config:
            return _GATES[activation](blas(x, w, bias, dtype))
    features = w.shape[0] if activation == "none" else w.shape[0] // 2
    y = torch.empty((stream.shape[0], features), dtype=dtype, device=stream.device)
    epilogue = Epilogue(y, bias, activation)
    if "gemv" in config:
        linear_gemv.gemv(stream, w, epilogue, config, norm, eps)
    else:
        _fused(x, w, epilogue, config)
    return y


def _linear_add(x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor, config: Config) -> None:
    if "cublas" in config:
        blas_add(x, w, bias, stream)
        return
    _fused(x, w, Epilogue(stream, bias, add=True), config)


def linear_launcher(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert dtype in (w.dtype, torch.float32), f"{dtype} of {w.dtype} weights"
    if x.shape[0] == 0:
        return _linear_fake(x, w, bias, dtype)
    return _linear(x, w, bias, dtype, _choose(x.shape[0], w, gated=False))


def norm_linear_launcher(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    assert dtype in (w.dtype, torch.float32), f"{dtype} of {w.dtype} weights"
    assert activation in _GATES, activation
    if stream.shape[0] == 0:
        return _norm_linear_fake(stream, norm, eps, w, bias, activation, dtype)
    config = _choose(stream.shape[0], w, gated=activation != "none")
    return _norm_linear(stream, norm, eps, w, bias, activation, dtype, config)


def linear_add_launcher(x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    if x.shape[0]:
        _linear_add(x, w, bias, stream, _choose(x.shape[0], w, gated=False))


def _linear_fake(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def _norm_linear_fake(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    features = w.shape[0] if activation == "none" else w.shape[0] // 2
    return stream.new_empty(stream.shape[0], features, dtype=dtype)


def _linear_add_fake(x: Tensor, w: Tensor, bias: Tensor | None, stream: Tensor) -> None:
    return None


linear = op(
    "linear(Tensor x, Tensor w, Tensor? bias, ScalarType dtype) -> Tensor",
    linear_reference,
    linear_launcher,
    _linear_fake,
)
norm_linear = op(
    "norm_linear(Tensor stream, Tensor norm, float eps, Tensor w, Tensor? bias, str activation,"
    " ScalarType dtype) -> Tensor",
    norm_linear_reference,
    norm_linear_launcher,
    _norm_linear_fake,
)
linear_add = op(
    "linear_add(Tensor x, Tensor w, Tensor? bias, Tensor(a!) stream) -> ()",
    linear_add_reference,
    linear_add_launcher,
    _linear_add_fake,
)


def _weight(
    n: int, k: int, bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    w = random((n, k), torch.float32, torch.device("cpu"), 31) / k**0.5
    return w.to(device, dtype), random((n,), dtype, device, 32) if bias else None


def _linear_case(
    size: tuple[int, int, int], bias: bool, aot: tuple[torch.dtype, ...] = (), logits: bool = False
) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((m, k + 8), dtype, device, 33)[:, :k]
        return x, *_weight(n, k, bias, dtype, device), torch.float32 if logits else dtype

    title = f"linear-{m}x{n}x{k}{'-bias' * bias}{'-logits' * logits}"
    # Tests of all operators in the interpreter want results of the dtype they ask for.
    fns = linear, linear_reference, linear_launcher
    return Case(title, *fns, build, interpret=not logits, aot=aot)


def _norm_case(
    size: tuple[int, int, int], activation: str, bias: bool, aot: tuple[torch.dtype, ...] = ()
) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        # Before it is normalised, this times the norm's weight is beyond float16.
        stream = random((m, k), torch.float32, device, 34) * 1000
        norm = random((k,), torch.float32, device, 35) * 50
        rows = n if activation == "none" else 2 * n
        return stream, norm, 1e-5, *_weight(rows, k, bias, dtype, device), activation, dtype

    title = f"norm_linear-{activation}-{m}x{n}x{k}{'-bias' * bias}"
    fns = norm_linear, norm_linear_reference, norm_linear_launcher
    return Case(title, *fns, build, aot=aot)


def _add_case(size: tuple[int, int, int], bias: bool, aot: tuple[torch.dtype, ...] = ()) -> Case:
    m, n, k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        x = random((m, k + 8), dtype, device, 36)[:, 8:]
        stream = random((m, n), torch.float32, device, 37)
        return x, *_weight(n, k, bias, dtype, device), stream

    title = f"linear_add-{m}x{n}x{k}{'-bias' * bias}"
    fns = linear_add, linear_add_reference, linear_add_launcher
    return Case(title, *fns, build, mutates=(3,), aot=aot)


def _cases() -> Iterator[Case]:
    yield _linear_case((1, 34, 2048), False, BOTH)
    yield _linear_case((1, 34, 1024), False, BF16, logits=True)
    yield _linear_case((40, 96, 512), True, logits=True)
    yield _linear_case((300, 96, 512), True, logits=True)
    for size in ((0, 8, 16), (1, 1, 33), (2, 41, 264), (3, 7, 1031)):
        yield _linear_case(size, bias=True)
    yield _linear_case((4, 36, 64), False)
    yield _linear_case((16, 70, 1100), True, BF16)
    for size in ((5, 1, 24), (33, 100, 1031), (64, 48, 192), (70, 33, 40)):
        yield _linear_case(size, bias=True)
    yield _linear_case((8, 129, 64), False)
    for activation, aot in (("none", BOTH), ("silu", BF16), ("gelu_tanh", BF16)):
        yield _norm_case((1, 20, 1024), activation, False, aot)
        yield _norm_case((12, 64, 1024), activation, False, aot)
        for size in ((0, 4, 16), (2, 13, 520), (3, 5, 257), (31, 33, 136), (80, 24, 64)):
            yield _norm_case(size, activation, bias=size[1] in (13, 33))
    yield _add_case((1, 34, 2048), False, BOTH)
    yield _add_case((8, 96, 1280), False, BF16)
    for size in ((0, 8, 16), (1, 3, 33), (4, 21, 512), (7, 65, 600), (64, 32, 64), (90, 24, 40)):
        yield _add_case(size, bias=size[1] == 65)


CASES = tuple(_cases())


def _runner(n: int, k: int, rows: int, device: torch.device) -> Callable[[Config], None]:
    """One product, of the kind that weights of this size are for (see ``_problems``)."""
    copies = 1 + (256 << 20) // (2 * n * k)
    weights = itertools.cycle(
        [
            torch.empty((n, k), dtype=torch.bfloat16, device=device).normal_(0, k**-0.5)
            for _ in range(copies)
        ]
    )
    stream = torch.randn((rows, k), device=device)
    x, norm = stream.bfloat16(), torch.ones(k, device=device)
    target = torch.zeros((rows, n), device=device)
    activation = "silu" if n >= 4 * k and n % 2 == 0 else "none"

    def run(config: Config) -> None:
        w = next(weights)
        if n > 65536:
            _linear(x, w, None, torch.float32, config)
        elif n <= k:
            _linear_add(x, w, None, target, config)
        else:
            _norm_linear(stream, norm, 1e-5, w, None, activation, w.dtype, config)

    return run


def _problems(shapes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """Every bucket of rows. What a weight is for follows from its size: logits above 65536 rows,
    the way back to the stream where it is not taller than wide, gate and up where it is at least
    four times taller than wide, otherwise the projections of attention."""
    for n, k in shapes:
        gated = 4 * k <= n <= 65536
        for bucket in (1, 8, 16, 32, 64, 128, 256):
            found: Iterable[Config] = linear_gemv.candidates(k, gated)
            if bucket > 1:
                size = bucket, n // 2 if gated else n, k, gated
                found = (*linear_skinny.candidates(*size), *linear_gemm.candidates(*size))

            def build(
                device: torch.device, n: int = n, k: int = k, rows: int = bucket
            ) -> Callable[[Config], None]:
                return _runner(n, k, rows, device)

            yield Problem(product_key(n, k, bucket), 2 * n * k, build, (*found, _CUBLAS))


TUNABLE = Tunable("linear", _problems)
