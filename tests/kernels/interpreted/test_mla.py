"""Latent attention in parts and pieces far shorter than a GPU would be given."""

import pytest
import torch

from squall.kernels.attention import mla_decode, mla_prefill
from squall.kernels.cases import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
CPU, SIZES = torch.device("cpu"), (24, 20, 10, 12)
ONE, UNEVEN = ((1, 500),), ((1, 200), (1, 1), (0, 0), (1, 0), (1, 450), (0, 40), (1, 33))
DECODES = (
    (ONE, 3, 16, 16),
    (((1, 200),), 70, 32, 32),
    (((1, 0),), 3, 16, 16),
    (((0, 50), (1, 64)), 3, 16, 16),
    (UNEVEN, 2, 32, 64),
    (UNEVEN, 1, 16, 16),
    (tuple((1, 5 + 9 * i) for i in range(17)), 2, 32, 64),
)


@pytest.mark.parametrize(("lengths", "heads", "tile", "min_keys"), DECODES)
def test_parts_are_merged(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[tuple[int, int], ...],
    heads: int,
    tile: int,
    min_keys: int,
) -> None:
    config = {"tile": tile, "warps": 4, "stages": 2, "programs": 1, "min_keys": min_keys}
    monkeypatch.setattr(mla_decode, "tuned", lambda *_: config)
    args = mla_decode.build_decode(lengths, heads, SIZES, 8, torch.float32, CPU)
    got = mla_decode.mla_decode_launcher(*args)
    assert relative_error(got, mla_decode.mla_decode_reference(*args)) < 1e-5


@pytest.mark.parametrize("piece", [16, 48])
@pytest.mark.parametrize(
    "lengths",
    [((150, 150),), ((40, 170),), ((1, 40), (33, 33), (35, 35), (90, 130), (9, 20), (50, 50))],
    ids=["whole", "chunk", "batch"],
)
def test_pieces_go_on(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[tuple[int, int], ...], piece: int
) -> None:
    monkeypatch.setattr(mla_prefill, "PIECE", piece)
    args = mla_prefill.build_prompts(lengths, 3, SIZES, torch.float32, CPU)
    got = mla_prefill.mla_prefill_launcher(*args)
    assert relative_error(got, mla_prefill.mla_prefill_reference(*args)) < 1e-5
