"""What the rest of Squall needs from a tokenizer, whatever file it was read from."""

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """Turns generated ids into text piece by piece; one per output sequence."""

    def push(self, token_id: int) -> str:
        """Add one id; return the text that has become final (maybe ``""``, never U+FFFD for
        a character whose bytes are still incomplete)."""
        ...

    def flush(self) -> str:
        """The rest of the text, once no more ids will come; incomplete bytes become U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back.

    ``encode(add_special=True)`` adds what the model file asks for (BOS, EOS);
    ``parse_special=True`` turns the spelled-out names of special tokens into their ids.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eos_ids: frozenset[int]  # every id that ends a turn (EOS, EOT, EOM), as the file declares them
    special_ids: frozenset[int]  # ids that decode to nothing when specials are skipped

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """The vocabulary entry as text (specials by name), as logprobs show it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the id contributes to running text (not the start of one)."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of a vocabulary entry by its exact spelling, or None."""
        ...

    def stream(self, *, skip_special: bool = True) -> TextStream: ...
