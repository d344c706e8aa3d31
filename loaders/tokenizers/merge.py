"""Byte-pair merging, shared by score-based (SentencePiece) and rank-based (GPT-2) vocabularies."""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush


def merge(symbols: list[str], order: Mapping[str, float], joint: str) -> list[str]:
    """Merge neighbours until none can be merged; returns the remaining pieces in text order.

    The pair whose ``order[left + joint + right]`` is smallest goes first, the leftmost of equals;
    pairs that are no key never merge. ``symbols`` (none empty) is used up. O(n log n): a heap of
    candidate pairs over a doubly linked list, outdated candidates dropped when they surface.
    """
    count = len(symbols)
    if count < 2:
        return symbols
    rank = order.get
    heap: list[tuple[float, int, int, int]] = []  # order, left index, right index, joint length
    for right in range(1, count):
        a, b = symbols[right - 1], symbols[right]
        found = rank(a + joint + b)
        if found is not None:
            heap.append((found, right - 1, right, len(a) + len(b)))
    if not heap:
        return symbols
    heapify(heap)
    after = [*range(1, count), -1]
    before = list(range(-1, count - 1))
    while heap:
        _, left, right, size = heappop(heap)
        a, b = symbols[left], symbols[right]
        # Symbols only ever grow to the right; two live ones of the old joint length are unchanged.
        if not a or not b or len(a) + len(b) != size:
            continue
        merged = symbols[left] = a + b
        symbols[right] = ""
        following = after[left] = after[right]
        if following >= 0:
            before[following] = left
            b = symbols[following]
            found = rank(merged + joint + b)
            if found is not None:
                heappush(heap, (found, left, following, len(merged) + len(b)))
        previous = before[left]
        if previous >= 0:
            a = symbols[previous]
            found = rank(a + joint + merged)
            if found is not None:
                heappush(heap, (found, previous, left, len(a) + len(merged)))
    return [symbol for symbol in symbols if symbol]
