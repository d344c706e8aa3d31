"""Ids back to text through a table of bytes, at once or one by one."""

import codecs
from collections.abc import Callable, Sequence


class Pieces(dict[int, bytes]):
    """Id -> the bytes it adds to running text; worked out when an id is first asked for."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._compute(token_id)
        return piece


def decode(pieces: Pieces, ids: Sequence[int], strip_space: bool) -> str:
    """The text of ``ids``: invalid UTF-8 becomes U+FFFD, ``strip_space`` drops a leading space."""
    text = b"".join([pieces[i] for i in ids]).decode("utf-8", "replace")
    return text.removeprefix(" ") if strip_space else text


class PieceStream:
    """The same text as :func:`decode`, piece by piece; see ``TextStream``."""

    __slots__ = ("_decode", "_pieces", "_strip")

    def __init__(self, pieces: Pieces, strip_space: bool) -> None:
        self._pieces = pieces
        self._strip = strip_space
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        text = self._decode(self._pieces[token_id])
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        text = self._decode(b"", True)
        self._strip = False
        return text


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the other 68 for
    U+0100 onwards in byte order (``bytes_to_unicode`` of openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def byte_level_encode(text: str) -> str:
    """The UTF-8 bytes of ``text`` spelled in the byte alphabet."""
    return text.encode().decode("latin-1").translate(BYTE_TO_CHAR)


def byte_level_decode(token: str) -> bytes:
    """The bytes that ``token`` spells; one with other characters in it stands for itself."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode()


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
