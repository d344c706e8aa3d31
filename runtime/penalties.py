"""Token counts for the repetition, frequency and presence penalties, and the DRY penalty."""

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall.runtime.params import MAX_DRY_MATCH, SamplingParams

MAX_DRY_PENALTY = 1e30  # keeps the logits finite


class TokenCounts:
    """How often every token occurs in every penalised sequence, kept on the device.

    ``pool`` int32 ``[rows, V]`` has a row for every sequence that asked for a penalty. A row
    returns to it when its owner is garbage-collected; it is dropped when no row is in use.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.pool = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    @property
    def used(self) -> int:
        """Rows in use."""
        return len(self.pool) - len(self._free)

    def claim(self, owner: object) -> int:
        """A row for ``owner``, all zero."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.pool[slot].zero_()
        weakref.finalize(owner, self._free.append, slot).atexit = False
        return slot

    def _grow(self) -> None:
        old = len(self.pool)
        grown = torch.zeros(
            max(2 * old, 1), self._vocab_size, dtype=torch.int32, device=self._device
        )
        grown[:old] = self.pool
        self.pool = grown
        self._free.extend(range(len(grown) - 1, old - 1, -1))

    def trim(self) -> None:
        """Give the memory back if no row is in use."""
        if self._free and not self.used:
            self.pool = self.pool.new_zeros(0, self._vocab_size)
            self._free.clear()

    def add(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Count ``token_ids[i]`` once more in row ``slots[i]``, for all i.

        Ids outside the vocabulary (placeholders in a prompt) are not counted.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        flat = np.asarray(slots, dtype=np.int64) * self._vocab_size + ids
        flat = flat[(ids >= 0) & (ids < self._vocab_size)]
        index = torch.from_numpy(flat).to(self._device)
        ones = torch.ones(len(flat), dtype=torch.int32, device=self._device)
        self.pool.view(-1).index_add_(0, index, ones)

    def clear(self, slot: int) -> None:
        """Forget what row ``slot`` counted."""
        self.pool[slot].zero_()

    def row(self, slot: int) -> Tensor:
        """int32 [V], the counts of one row; a view."""
        return self.pool[slot]

    def rows(self, slots: Tensor) -> Tensor:
        """int32 [P, V]: the counts of int64 ``slots`` [P]."""
        return self.pool.index_select(0, slots)


def penalise(
    logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Logits with the three penalties taken off; all arguments broadcast.

    For tokens that occur: repetition divides positive logits and multiplies negative ones (Keskar
    et al. 2019, as transformers does it), then ``count * frequency + presence`` is subtracted (the
    OpenAI formula, over prompt and output as mistral.rs does it).
    """
    seen = counts > 0
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, scaled - counts * frequency - presence, logits)


class Dry:
    """The DRY penalty of one sequence: tokens that would continue a repetition are made rarer.

    If the last n tokens occurred before, followed by token t, then t loses
    ``multiplier * base ** (n - allowed_length)`` when ``n >= allowed_length``; the longest match
    counts, up to 50 tokens, and no match reaches back over a sequence breaker.
    Source: p-e-w, text-generation-webui pull request 5677.
    """

    def __init__(self, params: SamplingParams, breakers: Iterable[Sequence[int]]) -> None:
        self._multiplier = params.dry_multiplier
        self._base = params.dry_base
        self._allowed = params.dry_allowed_length
        self._breakers = [list(ids) for ids in breakers if ids]
        self._tokens: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._length = 0
        self._after_breaker = 0  # first position behind the last breaker

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the sequence."""
        begin, end = self._length, self._length + len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(max(end, 2 * len(self._tokens)), dtype=np.int64)
            grown[:begin] = self._tokens[:begin]
            self._tokens = grown
        self._tokens[begin:end] = token_ids
        self._length = end
        for breaker in self._breakers:
            # Matches are no longer than 50, so older breakers do not matter.
            first = max(begin, end - MAX_DRY_MATCH, len(breaker) - 1)
            for stop in range(end, first, -1):
                if self._tokens[stop - len(breaker) : stop].tolist() == breaker:
                    self._after_breaker = max(self._after_breaker, stop)
                    break

    def penalties(self) -> list[tuple[int, float]]:
        """Token ids, each once, with what to subtract from their logits."""
        length = self._length
        longest = min(length - self._after_breaker, MAX_DRY_MATCH)
        if longest < max(self._allowed, 1):
            return []
        tokens = self._tokens[:length]
        matches = np.flatnonzero(tokens[:-1] == tokens[-1])  # ends of earlier occurrences
        best: dict[int, int] = {}
        size = 1
        while len(matches):
            if size >= self._allowed:
                best.update(dict.fromkeys(tokens[matches + 1].tolist(), size))
            if size == longest:
                break
            matches = matches[matches >= size]
            matches = matches[tokens[matches - size] == tokens[length - 1 - size]]
            size += 1
        power, limit = self._multiplier, MAX_DRY_PENALTY
        return [
            (token, min(power * self._base ** (size - self._allowed), limit))
            for token, size in best.items()
        ]
