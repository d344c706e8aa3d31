"""What ``tools/tune.py`` measures of the products with FP8 weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch

from squall.kernels.quant import fp8_gemv, fp8_skinny
from squall.kernels.quant.fp8 import BLOCK, blocks_of, random_fp8
from squall.kernels.quant.fp8_linear import (
    EXPAND,
    multiply,
    multiply_add,
    norm_multiply,
)
from squall.kernels.tuning import Config, Problem, Tunable, product_key


def _runner(n: int, k: int, rows: int, device: torch.device) -> Callable[[Config], None]:
    """One product, of the kind that weights of this size are for, as in ``linear``."""
    generator = torch.Generator(device).manual_seed(0)
    data, scales = random_fp8(n, k, BLOCK, device, generator)
    copies = [data, *(data.clone() for _ in range((256 << 20) // data.nbytes))]
    weights = cycle([(copy, scales, BLOCK) for copy in copies])
    stream = torch.randn((rows, k), device=device)
    x, norm = stream.bfloat16(), torch.ones(k, device=device)
    target = torch.zeros((rows, n), device=device)
    activation = "silu" if n >= 4 * k and n % 2 == 0 else "none"

    def run(config: Config) -> None:
        weight = next(weights)
        if n > 65536:
            multiply(x, weight, None, torch.float32, config)
        elif n <= k:
            multiply_add(x, weight, None, target, config)
        else:
            like = stream, norm, 1e-5, weight, None, activation, x.dtype, x.dtype
            norm_multiply(*like, config)

    return run


def _problems(shapes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """Every bucket of rows; what a weight is for follows from its size, as in ``linear``."""
    for n, k in shapes:
        for bucket in (1, 8, 16, 32, 64, 128, 256):
            found: Iterable[Config] = fp8_gemv.candidates(k)
            if bucket > 1:
                found = fp8_skinny.candidates(bucket, n, k)

            build = partial(_runner, n, k, bucket)
            nbytes = n * k + 4 * blocks_of(n) * blocks_of(k)
            yield Problem(product_key(n, k, bucket), nbytes, build, (*found, EXPAND))


TUNABLE = Tunable("fp8", _problems)
