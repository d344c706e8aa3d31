"""What the sampler knows about its rows, and the part of its work that lasts while they do."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall.runtime.params import GOLDEN, SamplingParams, mix64
from squall.runtime.penalties import Dry

Upload = Callable[[Any, torch.dtype], Tensor]  # list or array -> tensor on the sampler's device


def counts_tokens(params: SamplingParams) -> bool:
    """Whether a penalty needs the tokens counted."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def edits_logits(params: SamplingParams) -> bool:
    """Whether anything is added to or taken from the logits before temperature."""
    return bool(params.logit_bias) or params.dry_multiplier > 0.0 or counts_tokens(params)


@dataclass(slots=True, weakref_slot=True, eq=False)
class SampleRow:
    """What the sampler knows about one request; keep it for the life of the request.

    ``output_ids`` is the engine's list, which grows by every token taken. ``seed`` is the
    request's or, if it gave none, 64 random bits. A new row for a request that is under way
    continues where the old one left off (an unseeded one with new random bits).
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: list[int]
    dry_breaker_ids: Sequence[Sequence[int]] = ()
    seed: int = field(init=False)
    key: int = field(init=False)  # 64 bits made from the seed, which the draws depend on
    counts: bool = field(init=False)  # a penalty needs the tokens counted
    on_device: bool = field(init=False)  # the host need not know the tokens or see the logits
    plain_greedy: bool = field(init=False)  # argmax of the logits as they are, nothing else
    # The sampler's own:
    uid: int = field(default=-1, init=False)
    slot: int = field(default=-1, init=False)  # row of the token counts
    counted: int = field(default=-1, init=False)  # output tokens counted; -1: not even the prompt
    dry: Dry | None = field(default=None, init=False)
    dry_length: int = field(default=0, init=False)  # output tokens DRY has seen

    def __post_init__(self) -> None:
        params = self.params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self.key = mix64(self.seed)
        self.counts = counts_tokens(params)
        edited_by_host = bool(params.logit_bias) or params.dry_multiplier > 0.0
        self.on_device = params.logprobs is None and not edited_by_host
        self.plain_greedy = params.greedy and params.logprobs is None and not edits_logits(params)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that draw at random and need the same kinds of filters; tensors are ``[R, 1]``."""

    rows: list[int]
    index: Tensor  # int64 [R], the same
    keys: NDArray[np.uint64]  # [R], the mixed seeds
    temperature: Tensor  # float32
    top_k: Tensor | None  # accumulator dtype, vocabulary size where off
    top_p: Tensor | None  # accumulator dtype, infinite where off
    min_p: Tensor | None  # float32


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows with repetition, frequency or presence penalties; penalties are ``[P, 1]`` float32."""

    rows: list[int]
    index: Tensor  # int64 [P], the same
    slots: Tensor  # int64 [P], their rows of the token counts
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a list of rows that stays the same from step to step."""

    uids: list[int]
    edited: bool  # some logits are changed: work on a copy
    bias: tuple[Tensor, Tensor] | None  # flat places int64 [N], what to add float32 [N]
    dry: list[int]
    counted: Counted | None
    groups: list[Group]
    logprobs: list[int]
    top_logprobs: int  # the most that a row asks for


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans for one vocabulary and device."""

    vocab_size: int
    sum_dtype: torch.dtype
    upload: Upload

    def plan(self, uids: list[int], rows: Sequence[SampleRow]) -> Plan:
        """The plan for ``rows``, whose token-count slots are claimed already."""
        params = [row.params for row in rows]
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        cut = [i for i in drawn if self._cuts(params[i])]
        groups = [cut, [i for i in drawn if not self._cuts(params[i])]]
        return Plan(
            uids=uids,
            edited=any(edits_logits(p) for p in params),
            bias=self._bias(params),
            dry=[i for i, p in enumerate(params) if p.dry_multiplier > 0.0],
            counted=self._counted(rows),
            groups=[self._group(group, rows) for group in groups if group],
            logprobs=[i for i, p in enumerate(params) if p.logprobs is not None],
            top_logprobs=max((p.logprobs or 0 for p in params), default=0),
        )

    def _cuts(self, params: SamplingParams) -> bool:
        """Whether top-k or top-p may remove tokens."""
        return 0 < params.top_k < self.vocab_size or params.top_p < 1.0

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.upload(values, dtype).unsqueeze(-1)

    def _group(self, indices: list[int], rows: Sequence[SampleRow]) -> Group:
        params = [rows[i].params for i in indices]
        top_k = [min(p.top_k, self.vocab_size) if p.top_k > 0 else self.vocab_size for p in params]
        top_p = [p.top_p if p.top_p < 1.0 else float("inf") for p in params]
        min_p = [p.min_p for p in params]
        return Group(
            rows=indices,
            index=self.upload(indices, torch.int64),
            keys=np.array([rows[i].key for i in indices], dtype=np.uint64),
            temperature=self._column([p.temperature for p in params]),
            top_k=self._column([float(k) for k in top_k], self.sum_dtype)
            if min(top_k) < self.vocab_size
            else None,
            top_p=self._column(top_p, self.sum_dtype) if min(top_p) < 1.0 else None,
            min_p=self._column(min_p) if max(min_p) > 0.0 else None,
        )

    def _bias(self, params: list[SamplingParams]) -> tuple[Tensor, Tensor] | None:
        flat = [i * self.vocab_size + token for i, p in enumerate(params) for token in p.logit_bias]
        if not flat:
            return None
        values = [value for p in params for value in p.logit_bias.values()]
        return self.upload(flat, torch.int64), self.upload(values, torch.float32)

    def _counted(self, rows: Sequence[SampleRow]) -> Counted | None:
        indices = [i for i, row in enumerate(rows) if counts_tokens(row.params)]
        if not indices:
            return None
        params = [rows[i].params for i in indices]
        return Counted(
            rows=indices,
            index=self.upload(indices, torch.int64),
            slots=self.upload([rows[i].slot for i in indices], torch.int64),
            repetition=self._column([p.repetition_penalty for p in params]),
            frequency=self._column([p.frequency_penalty for p in params]),
            presence=self._column([p.presence_penalty for p in params]),
        )


def uniforms(
    keys: NDArray[np.uint64], positions: Sequence[int], bits: int = 52
) -> NDArray[np.float64]:
    """Numbers in [0, 1), a pure function of each ``(key, position)``: SplitMix64 as a counter.

    ``keys`` [R] are ``mix64(seed)``, ``positions`` [R] count the request's output tokens.
    """
    z = keys + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(64 - bits)) * 2.0**-bits
