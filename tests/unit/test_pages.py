"""The block pool: every block is in exactly one place, whatever the order of calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.runtime.pages import BlockPool, blocks_for, blocks_needed, longest_sequence


@pytest.mark.parametrize(
    ("tokens", "block_size", "blocks"),
    [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (1000, 32, 32), (5, 1, 5)],
)
def test_blocks_for(tokens: int, block_size: int, blocks: int) -> None:
    assert blocks_for(tokens, block_size) == blocks


@pytest.mark.parametrize(
    ("chunk", "block_size", "blocks"),
    [(1, 8, 1), (8, 8, 1), (16, 8, 2), (9, 8, 2), (10, 8, 2), (11, 8, 3), (12, 8, 2), (20, 8, 3)],
)
def test_blocks_of_a_chunk(chunk: int, block_size: int, blocks: int) -> None:
    spans = [(p, p + chunk - 1) for p in range(0, 40 * chunk, chunk)]
    assert max(end // block_size - begin // block_size + 1 for begin, end in spans) == blocks
    assert blocks_needed(40 * chunk, block_size, (-chunk,)) == blocks


@given(st.integers(0, 200), st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_blocks_needed_are_those_that_visible_tokens_lie_in(
    tokens: int, block_size: int, windows: list[int]
) -> None:
    most = 0
    for query in range(tokens):
        first = [max(0, query - w + 1) if w else 0 for w in windows]
        held = sum(query // block_size - start // block_size + 1 for start in first)
        most = max(most, held)
    needed = blocks_needed(tokens, block_size, tuple(windows))
    # with several groups and before windows have met all offsets, fewer may be enough
    longer = tokens + (len(windows) + 1) * 10 * max(windows)
    assert most <= needed <= blocks_needed(longer, block_size, tuple(windows))
    if len(windows) == 1 and tokens >= windows[0] + block_size:
        assert most == needed


@given(
    st.integers(1, 300),
    st.integers(0, 90),
    st.integers(1, 9),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_the_longest_sequence_is_the_longest_that_fits(
    limit: int, blocks: int, block_size: int, windows: list[int]
) -> None:
    groups = tuple(windows)
    fitting = [n for n in range(limit + 1) if blocks_needed(n, block_size, groups) <= blocks]
    assert longest_sequence(limit, blocks, block_size, groups) == fitting[-1]


def test_hands_out_every_block_once() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(2) + pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert (pool.free_blocks, pool.used_blocks) == (0, 5)
    pool.free(blocks)
    assert (pool.free_blocks, pool.used_blocks) == (5, 0)


def test_allocate_nothing() -> None:
    pool = BlockPool(1)
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [0]
    assert pool.allocate(0) == []


@pytest.mark.parametrize("count", [4, -1])
def test_asking_for_what_is_not_there_changes_nothing(count: int) -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match=f"asked for {count} blocks, 3 are free"):
        pool.allocate(count)
    assert pool.free_blocks == 3


def test_freeing_twice_is_refused() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks[:1])
    with pytest.raises(AssertionError, match=f"block {blocks[0]} was freed twice"):
        pool.free(blocks[:1])
    assert pool.free_blocks == 3


@pytest.mark.parametrize("foreign", [-1, 4, 1 << 40])
def test_freeing_a_foreign_block_is_refused(foreign: int) -> None:
    pool = BlockPool(4)
    pool.allocate(4)
    with pytest.raises(AssertionError, match="is not one of this pool's 4"):
        pool.free([foreign])
    assert pool.free_blocks == 0


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_an_empty_pool_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}"):
        BlockPool(num_blocks)


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 10)), max_size=60),
)
def test_blocks_are_conserved(num_blocks: int, calls: list[tuple[bool, int]]) -> None:
    pool = BlockPool(num_blocks)
    held: list[list[int]] = []
    for is_allocation, number in calls:
        if is_allocation and number <= pool.free_blocks:
            held.append(pool.allocate(number))
            assert len(held[-1]) == number
        elif not is_allocation and held:
            pool.free(held.pop(number % len(held)))
        used = [block for blocks in held for block in blocks]
        assert len(set(used)) == len(used) == pool.used_blocks
        assert all(0 <= block < num_blocks for block in used)
        assert pool.free_blocks == num_blocks - len(used)
    for blocks in held:
        pool.free(blocks)
    assert pool.free_blocks == num_blocks
    assert sorted(pool.allocate(num_blocks)) == list(range(num_blocks))
