"""Byte-pair encoding by merge rank: GGUF's ``gpt2`` (byte-level) and ``gemma4`` tokenizers."""

from collections.abc import Sequence

from squall.loaders.tokenizers.base import VocabTokenizer
from squall.loaders.tokenizers.detokenize import byte_level_decode, byte_level_encode
from squall.loaders.tokenizers.merge import merge
from squall.loaders.tokenizers.pretokenize import PreTokenizer
from squall.loaders.tokenizers.vocab import Vocab

_SPACE = "\u2581"


class BpeTokenizer(VocabTokenizer):
    """``merges``: "left right" strings, the most urgent first (of equal ones the first counts)."""

    def __init__(
        self,
        vocab: Vocab,
        merges: Sequence[str],
        pre: PreTokenizer,
        *,
        add_bos: bool,
        add_eos: bool,
    ) -> None:
        super().__init__(vocab, add_bos=add_bos, add_eos=add_eos, strip_space=False)
        last = len(merges) - 1
        self._ranks = {m: last - i for i, m in enumerate(reversed(merges))}
        self._pre = pre

    def _words(self, text: str, after_special: bool) -> Sequence[str]:
        return self._pre.split(text if self._pre.byte_level else text.replace(" ", _SPACE))

    def _word(self, word: str) -> tuple[int, ...]:
        find = self.vocab.ids.get
        spelled = byte_level_encode(word) if self._pre.byte_level else word
        if self._pre.ignore_merges or (self._pre.gemma and not word.strip("\n")):
            whole = find(spelled)
            if whole is not None:
                return (whole,)
        ids: list[int] = []
        for piece in merge(list(spelled), self._ranks, " "):
            token_id = find(piece)
            if token_id is not None:
                ids.append(token_id)
            elif self._pre.byte_level:
                # A vocabulary without the piece or its characters: nothing to represent them by.
                ids.extend(i for char in piece if char.isascii() and (i := find(char)) is not None)
            else:
                names = (f"<0x{byte:02X}>" for byte in piece.encode())
                ids.extend(i for name in names if (i := find(name)) is not None)
        return tuple(ids)

    def _text_bytes(self, token_id: int) -> bytes:
        token = self.vocab.tokens[token_id]
        if self._pre.byte_level:
            return byte_level_decode(token)
        return token.replace(_SPACE, " ").encode()
