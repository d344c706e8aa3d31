"""Ids to text for tokenizers of the ``tokenizers`` library.

Nearly all language models' decoders give every id its bytes, independent of its neighbours: those
run over a table. The others (WordPiece and the like) run through the library over a window of ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from squall.loaders.tokenizers.detokenize import Pieces, PieceStream, byte_level_decode, decode

_SPACE = "\u2581"


@dataclass(frozen=True)
class TableRules:
    """How tokens spell bytes: GPT-2's byte alphabet, or U+2581 for a space."""

    byte_level: bool
    byte_fallback: bool  # <0x0A> is a byte
    strip_space: bool  # a space at the start of the text is dropped


def table_rules(tokenizer: Any) -> TableRules | None:
    """The rules of the tokenizer's decoder, or None if ids do not have bytes of their own."""
    if tokenizer.decoder is None:
        return None
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return TableRules(byte_level=True, byte_fallback=False, strip_space=False)
    spaces = fallback = strip = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                spaces = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                spaces = True
                strip = strip or step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": (0 | 1) as start, "stop": 0}:
                strip = strip or start == 1
            case {"type": "ByteFallback"}:
                fallback = True
            case {"type": "Fuse"}:
                pass
            case _:
                return None
    return TableRules(False, fallback, strip) if spaces else None


class TableDecoder:
    """Decoding by table. Bytes that are no UTF-8 become U+FFFD one by one, not the whole run of
    byte tokens around them as in the library; this is what makes streaming exact."""

    def __init__(
        self,
        tokenizer: Any,
        rules: TableRules,
        added: frozenset[int],
        special: Mapping[int, str],
    ) -> None:
        self._tokenizer, self._rules = tokenizer, rules
        self._added, self._special = added, special
        self._tables = {
            skip: Pieces(partial(self._piece, skip_special=skip)) for skip in (False, True)
        }

    def _piece(self, token_id: int, skip_special: bool) -> bytes:
        if token_id in self._special:
            return b"" if skip_special else self._special[token_id].encode()
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._rules.byte_level:
            return token.encode() if token_id in self._added else byte_level_decode(token)
        if self._rules.byte_fallback and len(token) == 6 and token[:3] == "<0x":
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return str(token).replace(_SPACE, " ").encode()

    def piece(self, token_id: int, skip_special: bool) -> bytes:
        return self._tables[skip_special][token_id]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return decode(self._tables[skip_special], ids, self._rules.strip_space)

    def stream(self, skip_special: bool) -> PieceStream:
        return PieceStream(self._tables[skip_special], self._rules.strip_space)


class WindowDecoder:
    """Decoding by the library itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def piece(self, token_id: int, skip_special: bool) -> bytes:
        return self.decode([token_id], skip_special).encode()

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        known = [i for i in ids if i >= 0]
        text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool) -> "WindowStream":
        return WindowStream(self, skip_special)


class WindowStream:
    """Text is final once the ids after it no longer change it: what the latest ids add to the
    decoded window, unless that ends in the middle of a character."""

    def __init__(self, decoder: WindowDecoder, skip_special: bool) -> None:
        self._decoder, self._skip_special = decoder, skip_special
        self._ids: list[int] = []
        self._context = 0  # ids of the window whose text has been returned

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        known = self._decoder.decode(self._ids[: self._context], self._skip_special)
        text = self._decoder.decode(self._ids, self._skip_special)
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return text[len(known) :]
