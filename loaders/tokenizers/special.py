"""Finding spelled-out special tokens in text."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_PREFIX = 3  # characters by which candidates are found
_SPACE = "\t\n\x0b\x0c\r "


@dataclass(frozen=True)
class _Size:
    """The special tokens of one length in bytes: spelling -> id, and their character counts."""

    tokens: Mapping[str, int]
    lengths: tuple[int, ...]


class SpecialSplitter:
    """Cuts text at special tokens the way llama.cpp does.

    Longer tokens (in UTF-8 bytes) are cut out first wherever they occur, shorter ones out of what
    is left; of equally long ones the lower id goes first, each from left to right. ``strip_left``
    and ``strip_right`` tokens also swallow the white space before or after them.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        strip_left: Collection[int] = (),
        strip_right: Collection[int] = (),
    ) -> None:
        by_size: dict[int, dict[str, int]] = {}
        for text, token_id in tokens.items():
            by_size.setdefault(len(text.encode()), {})[text] = token_id
        self._sizes = [
            _Size(by_size[size], tuple({len(text) for text in by_size[size]}))
            for size in sorted(by_size, reverse=True)
        ]
        self._strip_left, self._strip_right = strip_left, strip_right
        starts = sorted({text[:_PREFIX] for text in tokens}, key=len, reverse=True)
        # A look-ahead, so that candidates may overlap.
        self._candidates = (
            re.compile("(?=" + "|".join(map(re.escape, starts)) + ")") if starts else None
        )

    def split(self, text: str) -> list[str | int]:
        """The pieces of ``text`` in order: non-empty strings, and ids of special tokens."""
        if not text:
            return []
        found = self._candidates and [m.start() for m in self._candidates.finditer(text)]
        if not found:
            return [text]
        taken = self._occurrences(text, found)
        pieces: list[str | int] = []
        position = 0
        for start, end, token_id in sorted(taken):
            if start > position:
                pieces.append(text[position:start])
            if token_id >= 0:
                pieces.append(token_id)
            position = end
        if position < len(text):
            pieces.append(text[position:])
        return pieces

    def _occurrences(self, text: str, found: list[int]) -> list[tuple[int, int, int]]:
        """Disjoint (start, end, id) spans; id -1 is white space that belongs to a token."""
        used = bytearray(len(text))
        spans: list[tuple[int, int, int]] = []
        for size in self._sizes:
            tokens = size.tokens
            hits = sorted(
                (token_id, start, start + length)
                for length in size.lengths
                for start in found
                if start + length <= len(text)
                and (token_id := tokens.get(text[start : start + length], -1)) >= 0
            )
            for token_id, start, end in hits:
                if used.find(1, start, end) >= 0:
                    continue
                spans.append((start, end, token_id))
                used[start:end] = b"\1" * (end - start)
                if token_id in self._strip_left:
                    first = start
                    while first > 0 and not used[first - 1] and text[first - 1] in _SPACE:
                        first -= 1
                    self._swallow(first, start, used, spans)
                if token_id in self._strip_right:
                    last = end
                    while last < len(text) and not used[last] and text[last] in _SPACE:
                        last += 1
                    self._swallow(end, last, used, spans)
            if hits:
                found = [start for start in found if not used[start]]
        return spans

    @staticmethod
    def _swallow(start: int, end: int, used: bytearray, spans: list[tuple[int, int, int]]) -> None:
        if end > start:
            used[start:end] = b"\1" * (end - start)
            spans.append((start, end, -1))
