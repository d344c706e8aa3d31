"""Turning, storing and attending in one launch, in parts far shorter than a GPU would be given."""

from typing import Any

import pytest
import torch

from squall.kernels.attention import decode_step
from squall.kernels.attention.decode_step import build_step, decode_attention_reference
from squall.kernels.attention.rope_store import rope_store_kv_launcher
from squall.kernels.cases import relative_error
from squall.kernels.counters import counters

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
CPU = torch.device("cpu")
ONE, UNEVEN = ((1, 231),), ((1, 100), (1, 1), (0, 0), (1, 0), (1, 190), (0, 40), (1, 33))
SMALL, WIDE = (3, 1, 24), (70, 1, 16)  # two blocks of heads on one kv head
CASES = (
    (ONE, (6, 2, 24), 0, "", 16, 16),
    (ONE, SMALL, 70, "norm skip", 32, 32),
    (((1, 225),), SMALL, 0, "sinks", 16, 32),  # a last tile of the newest key alone
    (((1, 449),), WIDE, 1, "norm", 64, 64),
    (((1, 449),), WIDE, 0, "skip", 64, 64),
    (((1, 0),), SMALL, 0, "", 16, 16),
    (((0, 50), (1, 64)), SMALL, 0, "norm", 16, 16),
    (UNEVEN, SMALL, 0, "int64", 32, 32),
    (UNEVEN, SMALL, 70, "norm skip sinks", 16, 16),
    (ONE, SMALL, -150, "norm", 16, 32),
    (((1, 321), (1, 320), (0, 0), (1, 0), (1, 200), (1, 33)), SMALL, -160, "sinks", 16, 16),
    (((1, 321), (1, 33)), WIDE, -32, "norm skip", 32, 32),  # a first token of a chunk
    (tuple((1, 5 + 7 * i) for i in range(17)), SMALL, 0, "sinks", 32, 32),
)


def step(lengths: Any, shape: Any, window: int, options: str) -> tuple[Any, ...]:
    return build_step(lengths, shape, 16, 8, (window, 0.0), torch.float32, CPU, options)


@pytest.mark.parametrize(("lengths", "shape", "window", "options", "tile", "min_keys"), CASES)
def test_parts_are_merged(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[tuple[int, int], ...],
    shape: tuple[int, int, int],
    window: int,
    options: str,
    tile: int,
    min_keys: int,
) -> None:
    config = {"tile": tile, "warps": 4, "stages": 2, "programs": 1, "min_keys": min_keys}
    monkeypatch.setattr("squall.kernels.attention.decode.tuned", lambda *_: config)
    args, expected = (step(lengths, shape, window, options) for _ in range(2))
    want = decode_attention_reference(*expected)
    got = decode_step.decode_attention_launcher(*args)
    assert not counters(CPU).any()
    assert relative_error(got, want) < 1e-5
    for i in (6, 7):
        assert relative_error(args[i], expected[i]) < 1e-5


@pytest.mark.parametrize("options", ["", "fp8", "fp8 norm", "fp8 skip"])
def test_what_is_stored_is_what_rope_store_kv_stores(options: str) -> None:
    lengths = tuple((1, 1 + 5 * i) for i in range(6))
    fused, apart = (step(lengths, (6, 2, 24), 0, options) for _ in range(2))
    decode_step.decode_attention_launcher(*fused)
    rope_store_kv_launcher(*apart[:9])
    for i in (6, 7):
        a, b = (args[i].view(torch.uint8) for args in (fused, apart))
        same = (a == b).float().mean()
        # Sums of squares in another order may tip a value over the middle between two codes.
        assert same == 1 if i == 7 or "norm" not in options else same > 0.99
