"""The splitting machinery behind the pre-tokenizers: text to words, by stages.

A pre-tokenizer is a sequence of stages. Each stage splits every piece the stages before left, as
if the piece were the whole text (a look-ahead does not see past the end of its piece). What a
regex does not match stays together as a piece of its own. Results are those of llama.cpp's
``unicode_regex_split``, special cases included; the search is linear in the length of the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from squall.loaders.tokenizers.unicode import (
    HAN_LETTER,
    HAN_OTHER,
    LETTER,
    MARK,
    NUMBER,
    PUNCTUATION,
    SYMBOL,
    collapse,
    narrow_spaces,
)

# What \p{..} stands for in a class regex: the ASCII members and the stand-in of all the others.
_PROPERTIES = {
    r"\p{L}": "A-Za-z" + LETTER,
    r"\p{N}": "0-9" + NUMBER,
    r"\p{M}": MARK,
    r"\p{P}": r"!-#%-*,-/:;?@\[-\]_{}" + PUNCTUATION,
    r"\p{S}": r"$+<->^`|~" + SYMBOL,
    r"\p{HanL}": HAN_LETTER,
    r"\p{Han}": HAN_LETTER + HAN_OTHER,
}


@dataclass(frozen=True)
class View:
    """One text as the stages see it: three strings with the same length and positions."""

    text: str
    classes: str  # collapsed: what class regexes run over
    wide: str  # white space above ASCII narrowed: what code point regexes run over


class Stage(Protocol):
    def ends(self, view: View, start: int, end: int) -> Iterator[int]:
        """Where the pieces of ``view[start:end]`` end, rising; the last one is ``end``."""
        ...


class Regex:
    """Split by a regex over classes (``\\p{L}`` ... only inside brackets) or code points."""

    def __init__(self, source: str, *, wide: bool = False) -> None:
        self.source = source
        self.wide = wide

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Compiled at first use: a process needs one row of a table of dozens."""
        source = self.source
        for name, members in _PROPERTIES.items():
            source = source.replace(name, members)
        # ASCII: \s and \d must not match the stand-ins, which are Latin-1 letters and signs.
        return re.compile(source, re.ASCII)

    def ends(self, view: View, start: int, end: int) -> Iterator[int]:
        last = start
        text = view.wide if self.wide else view.classes
        for match in self.pattern.finditer(text, start, end):
            first, last_end = match.span()
            if first > last:
                yield first
            yield last_end
            last = last_end
        if last < end:
            yield end


class TrailingSpace:
    """``\\s+$`` without the quadratic search: white space at the end of a piece is cut off."""

    def ends(self, view: View, start: int, end: int) -> Iterator[int]:
        kept = start + len(view.wide[start:end].rstrip("\t\n\x0b\x0c\r "))
        if start < kept < end:
            yield kept
        yield end


class DigitGroups:
    """Cut every run of ASCII digits into groups of three, counted from its right."""

    _digits = re.compile("[0-9]+")

    def ends(self, view: View, start: int, end: int) -> Iterator[int]:
        last = start
        for match in self._digits.finditer(view.classes, start, end):
            first, stop = match.span()
            for cut in range(first + (stop - first) % 3, stop, 3):
                if cut > last:
                    yield cut
                    last = cut
        if last < end:
            yield end


class LeadingDigitGroups:
    """Groups of three from the right, the first one keeping the text before the number.

    llama.cpp's rule for ``afmoe`` and ``tiny_aya``: text that precedes a number is not cut from
    the number's first group (``ab1234`` gives ``ab1``, ``234``).
    """

    _digits = re.compile(f"[0-9{NUMBER}]+")

    def ends(self, view: View, start: int, end: int) -> Iterator[int]:
        last = start
        for match in self._digits.finditer(view.classes, start, end):
            first, last = match.span()
            yield from range(first + ((last - first) % 3 or 3), last + 1, 3)
        if last < end:
            yield end


@dataclass(frozen=True)
class Splitter:
    """Splits text into the words that byte-pair merges never cross."""

    stages: tuple[Stage, ...]
    han: bool = False  # Han characters are a class of their own

    def __call__(self, text: str) -> list[str]:
        classes = collapse(text, self.han)
        only = self.stages[0]
        if classes is text and len(self.stages) == 1 and isinstance(only, Regex):
            words: list[str] = only.pattern.findall(text)
            if sum(map(len, words)) == len(text):  # nothing left out between the matches
                return words
        view = View(text, classes, narrow_spaces(text))
        ends = [len(text)]
        for stage in self.stages:
            start = 0
            cuts: list[int] = []
            for end in ends:
                cuts.extend(stage.ends(view, start, end))
                start = end
            ends = cuts
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
