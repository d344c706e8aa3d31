"""Byte-pair merging, shared by score-based (SentencePiece) and rank-based (GPT-2) vocabularies."""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

_LEFT = 32  # bits of a heap entry for the joint length; the same number above it for the index
_RANK = 64
_MASK = (1 << 32) - 1


def merge(symbols: list[str], order: Mapping[str, int], joint: str) -> list[str]:
    """Merge neighbours until none can be merged; returns the remaining pieces in text order.

    The pair whose ``order[left + joint + right]`` is smallest goes first, the leftmost of equals;
    pairs that are no key never merge. ``symbols`` (none empty) is used up. O(n log n): a heap of
    candidate pairs over a doubly linked list, outdated candidates dropped when they surface.
    """
    count = len(symbols)
    if count < 2:
        return symbols
    find = order.get
    # An entry is one integer, (order, index of the left symbol, joint length): no tuples for the
    # garbage collector to go through. The joint length of a left symbol and its neighbour only
    # grows, so an entry is outdated exactly if the length is not the present one.
    heap: list[int] = []
    a = symbols[0]
    for left in range(count - 1):
        b = symbols[left + 1]
        rank = find(a + joint + b)
        if rank is not None:
            heap.append(rank << _RANK | left << _LEFT | len(a) + len(b))
        a = b
    if not heap:
        return symbols
    heapify(heap)
    after = [*range(1, count), -1]
    before = list(range(-1, count - 1))
    while heap:
        entry = heappop(heap)
        left = entry >> _LEFT & _MASK
        a = symbols[left]
        right = after[left]
        if not a or right < 0 or len(a) + len(symbols[right]) != entry & _MASK:
            continue
        merged = symbols[left] = a + symbols[right]
        symbols[right] = ""
        following = after[left] = after[right]
        if following >= 0:
            before[following] = left
            b = symbols[following]
            rank = find(merged + joint + b)
            if rank is not None:
                heappush(heap, rank << _RANK | left << _LEFT | len(merged) + len(b))
        previous = before[left]
        if previous >= 0:
            a = symbols[previous]
            rank = find(a + joint + merged)
            if rank is not None:
                heappush(heap, rank << _RANK | previous << _LEFT | len(a) + len(merged))
    return [symbol for symbol in symbols if symbol]
