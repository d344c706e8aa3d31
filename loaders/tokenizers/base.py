"""What the tokenizers read from a vocabulary table have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

from squall.loaders.tokenizers.detokenize import Pieces, PieceStream, decode, well_formed
from squall.loaders.tokenizers.special import SpecialSplitter
from squall.loaders.tokenizers.vocab import Vocab

_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 64  # longer words are rare and would make the cache large


class VocabTokenizer(ABC):
    """Implements ``Tokenizer`` but for turning ordinary text into ids, and ids into bytes."""

    def __init__(self, vocab: Vocab, *, add_bos: bool, add_eos: bool, strip_space: bool) -> None:
        self.vocab = vocab
        self.vocab_size = len(vocab.tokens)
        self.bos_id, self.eos_id, self.unk_id = vocab.bos_id, vocab.eos_id, vocab.unk_id
        self.eos_ids = vocab.end_ids
        self.special_ids = vocab.hidden | (vocab.mute - vocab.user_defined)
        self.add_bos, self.add_eos = add_bos, add_eos
        self._strip_space = strip_space
        always = vocab.user_defined - vocab.hidden
        self._split_user = self._splitter(always)
        self._split_all = self._splitter(always | vocab.hidden)
        self._shown = Pieces(lambda i: self._piece(i, skip_special=True))
        self._all = Pieces(lambda i: self._piece(i, skip_special=False))
        self._cached_word = lru_cache(_CACHED_WORDS)(self._word)

    def _splitter(self, ids: frozenset[int]) -> SpecialSplitter:
        tokens = {self.vocab.tokens[i]: i for i in sorted(ids)}
        return SpecialSplitter(tokens, self.vocab.strip_left, self.vocab.strip_right)

    @abstractmethod
    def _words(self, text: str, after_special: bool) -> Sequence[str]:
        """Split text without special tokens into parts that are tokenized independently."""

    @abstractmethod
    def _word(self, word: str) -> tuple[int, ...]:
        """The ids of one such part."""

    @abstractmethod
    def _text_bytes(self, token_id: int) -> bytes:
        """The bytes of a normal token."""

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """See ``Tokenizer``. Lone surrogates, which no UTF-8 text has, become U+FFFD."""
        text = well_formed(text)
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        after_special = True
        cached, longest = self._cached_word, _CACHED_LENGTH
        for part in (self._split_all if parse_special else self._split_user).split(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            for word in self._words(part, after_special):
                ids.extend(cached(word) if len(word) <= longest else self._word(word))
            after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See ``Tokenizer``. Ids outside the vocabulary have no text."""
        return decode(self._shown if skip_special else self._all, ids, self._strip_space)

    def stream(self, *, skip_special: bool = True) -> PieceStream:
        return PieceStream(self._shown if skip_special else self._all, self._strip_space)

    def token_text(self, token_id: int) -> str:
        return self._all[token_id].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._shown[token_id]

    def token_id(self, text: str) -> int | None:
        return self.vocab.ids.get(text)

    def _piece(self, token_id: int, skip_special: bool) -> bytes:
        vocab = self.vocab
        if not 0 <= token_id < self.vocab_size:
            return b""
        if token_id in vocab.hidden:
            return b"" if skip_special else vocab.tokens[token_id].encode()
        if token_id in vocab.user_defined:
            return vocab.tokens[token_id].encode()
        if token_id in vocab.byte:
            return bytes([vocab.byte_of(token_id)])
        return b"" if token_id in vocab.mute else self._text_bytes(token_id)
