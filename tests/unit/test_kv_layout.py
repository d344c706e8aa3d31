"""Which layers share block tables and memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.models.config import DecoderConfig, LayerConfig, RopeConfig
from squall.models.kv_layout import MAX_GROUPS, KVLayout, kv_layout

LONG = 100_000


def layout(windows: list[int], max_len: int = LONG) -> KVLayout:
    return kv_layout(config(windows), max_len)


def config(windows: list[int]) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=LONG,
        norm_eps=1e-6,
        layers=tuple(LayerConfig(window) for window in windows),
        ropes=(RopeConfig(16),),
        tie_embeddings=True,
        attention_scale=1.0,
    )


@pytest.mark.parametrize("window", [0, 4096])
def test_layers_of_one_kind_are_one_group(window: int) -> None:
    found = layout([window] * 5)
    assert found == KVLayout((window,), (0,) * 5, (0, 1, 2, 3, 4))


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert layout([4096, 0, 4096], 4096) == KVLayout((0,), (0, 0, 0), (0, 1, 2))
    assert layout([4096, 0, 4096], 4097).windows == (0, 4096, 4096)
    assert layout([-4096, 0, -4096], 4096) == KVLayout((0,), (0, 0, 0), (0, 1, 2))
    assert layout([-4096, 0, -4096], 4097).windows == (-4096, -4096, 0)


def test_groups_of_equal_size_share_places() -> None:
    found = layout([7, 7, 0, 7, 7, 0])
    assert found.windows == (0, 7, 7)
    assert found.groups == (1, 1, 0, 2, 2, 0)
    assert found.places == (0, 1, 0, 0, 1, 1)
    # 2 layers of keys and values of 2 heads with 16 elements, 32 tokens
    assert found.block_bytes(config([7, 7, 0, 7, 7, 0]), 2, 32) == 2 * 2 * 2 * 16 * 2 * 32


@pytest.mark.parametrize(
    ("full", "sliding", "groups", "layers"),
    [
        pytest.param(10, 52, (1, 5), 11, id="Gemma 3 27B"),
        pytest.param(4, 22, (1, 6), 4, id="Gemma 3 1B"),
        pytest.param(12, 12, (1, 1), 12, id="GPT-OSS 20B"),
        pytest.param(8, 24, (1, 3), 8, id="OLMo 3 7B"),
        pytest.param(17, 16, (1, 1), 17, id="one more"),
        pytest.param(12, 36, (1, 3), 12, id="Llama 4"),
        pytest.param(27, 1, (7, 1), 4, id="one alone"),
    ],
)
def test_group_sizes(full: int, sliding: int, groups: tuple[int, int], layers: int) -> None:
    found = layout([0] * full + [512] * sliding)
    assert found.windows == (0,) * groups[0] + (512,) * groups[1]
    assert found.group_layers == layers


@given(st.lists(st.sampled_from([0, 5, -5, 512, -4096]), min_size=1, max_size=90))
def test_every_layer_has_its_own_place_in_a_group_of_its_window(windows: list[int]) -> None:
    found = layout(windows)
    assert len(set(zip(found.groups, found.places, strict=True))) == len(windows)
    assert [found.windows[group] for group in found.groups] == windows
    assert len(found.windows) <= MAX_GROUPS
    assert set(found.groups) == set(range(len(found.windows)))
