"""SentencePiece BPE by score: GGUF's ``llama`` tokenizers and ``tokenizer.model`` files.

Pieces are merged pairwise, the best-scored result first, over the whole text with spaces written
as U+2581; a character that is no piece becomes its UTF-8 bytes' tokens ``<0x..>``.
"""

import re
from collections.abc import Sequence

import numpy as np

from squall.loaders.tokenizers.base import VocabTokenizer
from squall.loaders.tokenizers.merge import merge
from squall.loaders.tokenizers.vocab import Vocab

_SPACE = "\u2581"


class SpmTokenizer(VocabTokenizer):
    """``space_prefix``: text that starts the prompt or follows a special token gets a space."""

    def __init__(self, vocab: Vocab, *, add_bos: bool, add_eos: bool, space_prefix: bool) -> None:
        super().__init__(vocab, add_bos=add_bos, add_eos=add_eos, strip_space=space_prefix)
        if vocab.scores is None:
            raise ValueError("a score-based vocabulary needs scores")
        self._prefix = _SPACE if space_prefix else ""
        _, ranks = np.unique(-np.array(vocab.scores), return_inverse=True)  # the best score: 0
        self._order: dict[str, int] = dict(zip(vocab.tokens, ranks.tolist(), strict=True))
        self._word_starts = re.compile(f"(?<={self._final_characters()})(?={_SPACE})")
        self._bytes = [self._byte_token(byte) for byte in range(256)]

    def _final_characters(self) -> str:
        """The characters after which a space starts a new word, as a regex class.

        No merge joins a character with a following space unless some piece holds the two side by
        side, so text can be cut between all others without any effect on the ids.
        """
        joined = {_SPACE}
        for token in self.vocab.tokens:
            at = token.find(_SPACE, 1)
            while at > 0:
                joined.add(token[at - 1])
                at = token.find(_SPACE, at + 1)
        return "[^" + "".join(map(re.escape, sorted(joined))) + "]"

    def _byte_token(self, byte: int) -> int | None:
        ids = self.vocab.ids
        found = ids.get(f"<0x{byte:02X}>")
        if found is None and byte < 128:
            found = ids.get(chr(byte))
        return self.unk_id if found is None else found

    def _words(self, text: str, after_special: bool) -> Sequence[str]:
        text = (self._prefix if after_special else "") + text.replace(" ", _SPACE)
        return self._word_starts.split(text)

    def _word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        find = self.vocab.ids.get
        for piece in merge(list(word), self._order, ""):
            token_id = find(piece)
            if token_id is not None:
                ids.append(token_id)
            else:
                ids.extend(i for b in piece.encode() if (i := self._bytes[b]) is not None)
        return tuple(ids)

    def _text_bytes(self, token_id: int) -> bytes:
        return self.vocab.tokens[token_id].replace(_SPACE, " ").encode()
