"""The sampler: logits of a batch to token ids, each row by its own parameters.

Order of operations (that of mistral.rs, its defects mended), for rows that are not greedy all of
it, for greedy rows the first four:

1. ``logit_bias`` is added.
2. DRY is subtracted (``squall.runtime.penalties.Dry``).
3. ``repetition_penalty``, over prompt and output.
4. ``frequency_penalty`` and ``presence_penalty``, over prompt and output.
5. ``temperature`` divides. Below 1e-7: the most likely token is taken (ties: the lowest id).
6. ``top_k`` keeps the k most likely tokens.
7. ``top_p`` keeps tokens while those more likely add up to less than p. The sums are of the whole
   softmax: top_k does not renormalise.
8. ``min_p`` keeps tokens at least min_p times as probable as the most likely one, whatever top_p.
9. One of those left is drawn.

The draw of the i-th output token of a request uses a number that depends on the request's seed
and on i alone, so that neither neighbours nor the place in the batch change a seeded request.
Log-probabilities are natural logarithms of the softmax of the model's own logits, before 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squall.kernels.sample import count_tokens_, penalize_
from squall.runtime.filters import BLOCK, accumulator, draw, keep_prefix
from squall.runtime.params import MAX_LOGPROBS, SamplingParams
from squall.runtime.penalties import Dry, TokenCounts, penalise
from squall.runtime.request import TokenLogprob
from squall.runtime.sample_plan import (
    Counted,
    Group,
    Plan,
    Planner,
    SampleRow,
    uniforms,
)

__all__ = ["SampleOutput", "SampleRow", "Sampler", "demanding_rows"]

CHUNK_ELEMENTS = 1 << 24  # logits worked on at a time: bounds the workspace
TIE_MARGIN = 12  # further top-k candidates, so that ties at the end are ordered by id
BAD_LOGITS = "the model produced logits that are not finite"


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One token per row. ``errors`` maps a failed row to the reason; its token id is -1."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None  # None: no row has any
    errors: dict[int, str]


class Sampler:
    """Samples the next token of every row. One per engine; not thread-safe."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        """``vocab_size`` is the width of the logits it will be given, on ``device``."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.counts = TokenCounts(vocab_size, self.device)
        self._sum_dtype = accumulator(self.device)
        self._planner = Planner(vocab_size, self._sum_dtype, self._upload)
        self._plans: dict[int, Plan] = {}  # by the first row of the chunk
        self._next_uid = 0
        self._chunk = max(1, CHUNK_ELEMENTS // vocab_size)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> SampleOutput:
        """Sample one token for each row of ``logits`` [len(rows), vocab_size], any float dtype.

        ``logits`` are left as they are. A row with NaN or infinite logits (-inf is allowed, as
        long as another is finite) fails alone.
        """
        assert logits.shape == (len(rows), self.vocab_size), (logits.shape, len(rows))
        if all(row.plain_greedy for row in rows):
            return as_output(_usable(*_best(logits)).tolist(), None)
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for start in range(0, len(rows), self._chunk):
            part = rows[start : start + self._chunk]
            plan = self._plan(start, part)
            raw = logits[start : start + self._chunk]
            ids = self._sample_chunk(raw, part, plan)
            host_ids = ids.tolist()
            token_ids += host_ids
            logprobs += _logprobs(raw, ids, host_ids, part, plan)
        return as_output(token_ids, logprobs if any(logprobs) else None)

    def release(self) -> None:
        """Give idle memory back; call it when nothing runs."""
        self._plans.clear()
        self.counts.trim()

    def _upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        host = torch.as_tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)

    def _plan(self, start: int, rows: Sequence[SampleRow]) -> Plan:
        for row in rows:
            self._know(row)
        uids = [row.uid for row in rows]
        plan = self._plans.get(start)
        if plan is None or plan.uids != uids:
            plan = self._plans[start] = self._planner.plan(uids, rows)
        return plan

    def _know(self, row: SampleRow) -> None:
        """Give a row that is new its number, and its place among the token counts."""
        if row.uid < 0:
            row.uid = self._next_uid
            self._next_uid += 1
            if row.counts:
                row.slot = self.counts.claim(row)

    def penalize(self, logits: Tensor, rows: Sequence[SampleRow], positions: Sequence[int]) -> None:
        """Take repetition, frequency and presence penalties off ``logits`` [R, V], in place, when
        the tokens up to ``positions`` [R] (output tokens before this one) were counted on the
        device as they were sampled."""
        slots: list[int] = []
        tokens: list[int] = []
        for row, position in zip(rows, positions, strict=True):
            self._know(row)
            if row.counts:
                first = row.counted < 0
                known = row.output_ids[max(row.counted, 0) : position]
                new = [*row.prompt_ids, *known] if first else known
                slots += [row.slot] * len(new)
                tokens += new
                row.counted = position + 1
        if tokens:
            self.counts.add(slots, tokens)
        params = [row.params for row in rows]
        penalize_(
            logits,
            self.counts.pool,
            self._upload([row.slot for row in rows], torch.int32),
            self._upload([p.repetition_penalty for p in params], torch.float32),
            self._upload([p.frequency_penalty for p in params], torch.float32),
            self._upload([p.presence_penalty for p in params], torch.float32),
        )

    def count(self, rows: Sequence[SampleRow], ids: Tensor) -> None:
        """Count the sampled ``ids`` int32 [R] of the rows that ``penalize`` was given."""
        slots = self._upload([row.slot for row in rows], torch.int32)
        count_tokens_(self.counts.pool, slots, ids)

    def _sample_chunk(self, logits: Tensor, rows: Sequence[SampleRow], plan: Plan) -> Tensor:
        """Token ids int64 [len(rows)], -1 where the logits are unusable."""
        x = logits.to(torch.float32, copy=plan.edited).contiguous()
        if plan.bias is not None:
            x.view(-1).index_add_(0, *plan.bias)
        if plan.dry:
            self._subtract_dry(x, rows, plan.dry)
        if plan.counted is not None:
            self._penalise(x, rows, plan.counted)
        top, ids = _best(x)
        for group in plan.groups:
            positions = [len(rows[i].output_ids) for i in group.rows]
            if len(group.rows) == len(rows):
                ids = self._draw(x, top, group, positions)
            else:
                parts = x.index_select(0, group.index), top.index_select(0, group.index)
                ids = ids.index_copy(0, group.index, self._draw(*parts, group, positions))
        return _usable(top, ids)

    def _draw(self, x: Tensor, top: Tensor, group: Group, positions: list[int]) -> Tensor:
        """Draw a token for every row of ``x`` [R, V] with maxima ``top`` [R]."""
        width = -(-self.vocab_size // BLOCK) * BLOCK
        weights = x.new_full((len(x), width), -torch.inf)
        weights[:, : self.vocab_size] = x
        weights.sub_(top.unsqueeze(-1)).div_(group.temperature).exp_()
        if group.top_k is not None or group.top_p is not None:
            weights.mul_(keep_prefix(weights, group.top_k, group.top_p, self.vocab_size))
        if group.min_p is not None:
            weights.mul_(weights >= group.min_p)
        bits = 52 if self._sum_dtype == torch.float64 else 23
        uniform = uniforms(group.keys, positions, bits)
        return draw(weights, self._upload(uniform, self._sum_dtype))

    def _subtract_dry(self, x: Tensor, rows: Sequence[SampleRow], indices: list[int]) -> None:
        flat: list[int] = []
        amounts: list[float] = []
        for index in indices:
            row = rows[index]
            if row.dry is None or row.dry_length > len(row.output_ids):
                row.dry = Dry(row.params, row.dry_breaker_ids)
                row.dry.extend(row.prompt_ids)
                row.dry_length = 0
            row.dry.extend(row.output_ids[row.dry_length :])
            row.dry_length = len(row.output_ids)
            for token, amount in row.dry.penalties():
                if 0 <= token < self.vocab_size:  # a prompt may hold ids that have no logit
                    flat.append(index * self.vocab_size + token)
                    amounts.append(amount)
        if flat:
            values = self._upload(amounts, torch.float32)
            x.view(-1).index_add_(0, self._upload(flat, torch.int64), values, alpha=-1)

    def _penalise(self, x: Tensor, rows: Sequence[SampleRow], counted: Counted) -> None:
        slots: list[int] = []
        tokens: list[int] = []
        for index in counted.rows:
            row = rows[index]
            if 0 <= row.counted <= len(row.output_ids):
                new: Sequence[int] = row.output_ids[row.counted :]
            else:
                self.counts.clear(row.slot)
                new = [*row.prompt_ids, *row.output_ids]
            slots += [row.slot] * len(new)
            tokens += new
            row.counted = len(row.output_ids)
        if tokens:
            self.counts.add(slots, tokens)
        penalties = counted.repetition, counted.frequency, counted.presence
        if x.device.type == "cpu":
            for place, index in enumerate(counted.rows):
                counts = self.counts.row(rows[index].slot)
                seen = counts.nonzero().squeeze(-1)
                edited = penalise(x[index, seen], counts[seen], *(p[place] for p in penalties))
                x[index, seen] = edited
            return
        edited = penalise(
            x.index_select(0, counted.index), self.counts.rows(counted.slots), *penalties
        )
        x.index_copy_(0, counted.index, edited)


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row (NaN if there is one) and its first place."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # Ten times faster than torch.max(dim) for one row of a large vocabulary.
        ids = torch.from_numpy(x.numpy().argmax(-1))
        return x.gather(-1, ids.unsqueeze(-1)).squeeze(-1), ids
    top, ids = x.max(-1)
    return top, ids


def _usable(top: Tensor, ids: Tensor) -> Tensor:
    """``ids``, -1 where the largest logit is NaN or infinite."""
    return torch.where(torch.isfinite(top), ids, -1)


def as_output(
    token_ids: list[int], logprobs: list[TokenLogprob | None] | None = None
) -> SampleOutput:
    """Token ids with an error for each that is negative."""
    errors = {i: BAD_LOGITS for i, token in enumerate(token_ids) if token < 0}
    return SampleOutput(token_ids, logprobs, errors)


def _logprobs(
    logits: Tensor, ids: Tensor, host_ids: list[int], rows: Sequence[SampleRow], plan: Plan
) -> list[TokenLogprob | None]:
    """Log-probabilities under the softmax of the logits as the model gave them."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    if not plan.logprobs:
        return result
    index = torch.tensor(plan.logprobs, device=logits.device)
    x = logits.index_select(0, index).float()
    total = x.logsumexp(-1, keepdim=True)
    chosen = x.gather(-1, ids.index_select(0, index).clamp(min=0).unsqueeze(-1)) - total
    tops: list[list[tuple[int, float]]] = [[] for _ in plan.logprobs]
    if plan.top_logprobs:
        values, places = x.topk(min(plan.top_logprobs + TIE_MARGIN, x.shape[-1]))
        pairs = zip(places.tolist(), (values - total).tolist(), strict=True)
        tops = [
            sorted(zip(*pair, strict=True), key=lambda entry: (-entry[1], entry[0]))
            for pair in pairs
        ]
    for i, logprob, top in zip(plan.logprobs, chosen.squeeze(-1).tolist(), tops, strict=True):
        if host_ids[i] >= 0:
            result[i] = TokenLogprob(host_ids[i], logprob, top[: rows[i].params.logprobs])
    return result


def demanding_rows(count: int, vocab_size: int) -> list[SampleRow]:
    """Rows that need the most memory a legal batch of ``count`` can make the sampler use."""
    params = SamplingParams(
        top_k=max(vocab_size // 2, 1),
        top_p=0.5,
        min_p=0.01,
        repetition_penalty=1.1,
        dry_multiplier=1.0,
        logit_bias={0: 1.0},
        logprobs=MAX_LOGPROBS,
    )
    return [SampleRow(params, [0], []) for _ in range(count)]
