"""Splitting and merging in the decode kernel, with parts far shorter than a GPU would be given."""

import pytest
import torch

from squall.kernels.attention import decode
from squall.kernels.attention.paged import build_batch, paged_attention_reference
from squall.kernels.cases import relative_error
from squall.kernels.counters import counters

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
CPU = torch.device("cpu")
ONE, UNEVEN = ((1, 500),), ((1, 200), (1, 1), (0, 0), (1, 0), (1, 450), (0, 40), (1, 33))
CASES = (
    (ONE, 0, "", 16, 16),
    (ONE, 70, "fp8", 32, 32),
    (((1, 0),), 0, "sinks", 16, 16),
    (((0, 50), (1, 64)), 0, "", 16, 16),
    (UNEVEN, 0, "", 32, 64),
    (UNEVEN, 70, "sinks", 16, 16),
    (ONE, -300, "fp8", 32, 32),
    (((1, 321), (1, 320), (0, 0), (1, 0), (1, 450), (1, 33)), -160, "sinks", 16, 16),
    (UNEVEN, 0, "fp8 sinks", 16, 16),
    (tuple((1, 5 + 9 * i) for i in range(17)), 0, "sinks", 32, 64),
)


@pytest.mark.parametrize(("lengths", "window", "options", "tile", "min_keys"), CASES)
def test_parts_are_merged(
    lengths: tuple[tuple[int, int], ...], window: int, options: str, tile: int, min_keys: int
) -> None:
    args = build_batch(lengths, (6, 2, 24), 8, (window, 0.0), torch.float32, CPU, options)
    q, k, v, *index = args[:6]
    config = {"tile": tile, "warps": 4, "stages": 2, "programs": 1, "min_keys": min_keys}
    out = torch.full(q.shape, float("nan"))
    limits = (args[8], window, 0.0)
    for _ in range(2):  # the second launch needs the counters that the first one left
        decode.decode(q, k, v, tuple(index), limits, args[11], out, config)
        assert not counters(CPU).any()
    assert relative_error(out, paged_attention_reference(*args)) < 1e-5
