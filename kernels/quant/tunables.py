"""What ``tools/tune.py`` measures of the products with planes: the types of the usual files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.gemm import candidates as gemm_candidates
from squall.kernels.quant.gemm import gemm
from squall.kernels.quant.gemv import candidates as gemv_candidates
from squall.kernels.quant.gemv import gemv
from squall.kernels.quant.planes import Planes, layout, padded, random_planes, tuning_key
from squall.kernels.tuning import Config, Problem, Tunable

_NAMES = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0")
_KINDS = [next(e.ggml_type for e in gguf_formats().values() if e.name == name) for name in _NAMES]
_BYTES = 256 << 20  # of copies of a weight, in turn: several times an L2 cache

Shapes = Sequence[tuple[int, int]]


def _weights(kind: int, n: int, k: int, device: torch.device) -> Iterator[Planes]:
    """Copies of one weight, one after the other, so that none is in the L2 cache."""
    generator = torch.Generator(device).manual_seed(0)
    first = random_planes(gguf_formats()[kind], n, k, device, generator)
    copies = [_copy(first) for _ in range(_BYTES // first.nbytes)]
    return cycle([first, *copies])


def _copy(planes: Planes) -> Planes:
    high = None if planes.high is None else planes.high.clone()
    supers = None if planes.supers is None else planes.supers.clone()
    low, scales = planes.low.clone(), planes.scales.clone()
    return replace(planes, low=low, high=high, scales=scales, supers=supers)


def _epilogue(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Epilogue:
    """What a weight is for follows from its size, as for :mod:`squall.kernels.linear`: logits, the
    way back to the stream, gate and up, or the rest."""
    add, gated = n <= k, 4 * k <= n <= 65536
    dtype = torch.float32 if add or n > 65536 else dtype
    out = torch.zeros((rows, n // 2 if gated else n), dtype=dtype, device=device)
    return Epilogue(out, None, "silu" if gated else "none", add)


def _gemm_runner(
    kind: int, n: int, k: int, rows: int, device: torch.device
) -> Callable[[Config], None]:
    weights = _weights(kind, n, k, device)
    x = torch.randn((rows, k), device=device).half()
    epilogue = _epilogue(rows, n, k, x.dtype, device)

    def run(config: Config) -> None:
        gemm(x, next(weights).tensors, kind, epilogue, config)

    return run


def _gemv_runner(kind: int, n: int, k: int, device: torch.device) -> Callable[[Config], None]:
    weights = _weights(kind, n, k, device)
    epilogue = _epilogue(1, n, k, torch.bfloat16, device)
    x = torch.randn((1, k), device=device)
    norm: Tensor | None = torch.ones(k, device=device)
    if epilogue.add:  # of activations, not of the stream
        x, norm = x.bfloat16(), None

    def run(config: Config) -> None:
        gemv(x, norm, 1e-5, next(weights).tensors, kind, epilogue, config)

    return run


def _gemm_problems(shapes: Shapes) -> Iterator[Problem]:
    for kind in _KINDS:
        plan = layout(kind)
        for n, k in shapes:
            width = padded(k)
            nbytes = int(n * width * plan.bits / 8)
            for bucket in (16, 32, 64, 128, 256):
                build = partial(_gemm_runner, kind, n, k, bucket)
                tried = gemm_candidates(plan, bucket, n, width)
                yield Problem(tuning_key(kind, n, width, bucket), nbytes, build, tried)


def _gemv_problems(shapes: Shapes) -> Iterator[Problem]:
    for kind in _KINDS:
        plan = layout(kind)
        for n, k in shapes:
            width = padded(k)
            build = partial(_gemv_runner, kind, n, k)
            tried = tuple(gemv_candidates(width * plan.low_bits // 128))
            nbytes = int(n * width * plan.bits / 8)
            yield Problem(tuning_key(kind, n, width, 1), nbytes, build, tried)


TUNABLES = (Tunable("plane_gemm", _gemm_problems), Tunable("plane_gemv", _gemv_problems))
