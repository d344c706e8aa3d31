"""The KV cache's blocks: which are in use, which are free, how many a sequence needs. No tensors
here, only block ids.

The layers are in groups (``squall.models.kv_layout``), which differ in the tokens they keep: all of
them (window 0), or those that the next query sees (``squall.kernels.attention.window``). A block
holds the tokens of one group, and any block can serve any group, so there is one pool. A sequence
has a block table for each group.

Callers see ``allocate``, ``free`` and ``free_blocks``. None of them promises which ids come back
or that a freed block is forgotten at once, so sharing (reference counts) and keeping freed blocks
for later hits (a cache keyed by content) can be added inside this class.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks of ``block_size`` tokens hold ``tokens`` tokens."""
    return -(-tokens // block_size)


def blocks_needed(tokens: int, block_size: int, windows: tuple[int, ...]) -> int:
    """The most blocks a sequence of ``tokens`` tokens holds, of all groups together, while it is
    computed token by token. Longer chunks need more for one step: a chunk's first query still sees
    the window before it."""
    whole = blocks_for(tokens, block_size)
    return sum(min(whole, _most_blocks(w, block_size)) if w else whole for w in windows)


def _most_blocks(window: int, block_size: int) -> int:
    """Blocks that the tokens of a window, or of a chunk, reach into at most. A window begins
    anywhere in a block, a chunk at a multiple of its size only."""
    step = math.gcd(window, block_size) if window < 0 else 1
    return (abs(window) - step - 1) // block_size + 2


def longest_sequence(limit: int, blocks: int, block_size: int, windows: tuple[int, ...]) -> int:
    """The longest sequence (tokens, at most ``limit``) that ``blocks`` blocks are enough for."""
    lengths = range(block_size, limit + block_size, block_size)
    fitting = bisect_right(lengths, blocks, key=lambda n: blocks_needed(n, block_size, windows))
    return min(limit, fitting * block_size)


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1``; O(1) a block."""

    __slots__ = ("_free", "_used", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        """Raises ValueError when ``num_blocks`` is less than 1."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least 1 block")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last freed is warmest
        self._used = bytearray(num_blocks)

    @property
    def free_blocks(self) -> int:
        """How many blocks ``allocate`` could hand out now."""
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        """How many blocks are handed out."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks. Asking for more than ``free_blocks`` is an AssertionError:
        the scheduler plans within what is free."""
        stack = self._free
        keep = len(stack) - count
        assert 0 <= keep <= len(stack), f"asked for {count} blocks, {len(stack)} are free"
        blocks = stack[keep:]
        blocks.reverse()
        del stack[keep:]
        used = self._used
        for block in blocks:
            used[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take blocks back. An id that is not handed out now (freed twice, or never one of this
        pool's) is an AssertionError."""
        used = self._used
        for block in blocks:
            assert 0 <= block < self.num_blocks, (
                f"block {block} is not one of this pool's {self.num_blocks}"
            )
            assert used[block], f"block {block} was freed twice"
            used[block] = 0
            self._free.append(block)
