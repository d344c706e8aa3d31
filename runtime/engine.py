"""The engine: requests in, one model step at a time, token events out.

With CUDA the host runs one step ahead: a step is planned and launched while the one before it is
still computing, and only then are that one's tokens booked.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from squall.models.batch import Batch, KVCache
from squall.models.decoder import Decoder
from squall.runtime import scheduler
from squall.runtime.pages import BlockPool
from squall.runtime.request import EngineRequest, TokenEvent, TokenLogprob
from squall.runtime.request import Sequence as Seq
from squall.runtime.runner import Launched, Runner
from squall.runtime.sampler import SampleOutput, SampleRow
from squall.runtime.scheduler import Chunk, Limits, Plan, State

log = logging.getLogger(__name__)


class EngineError(Exception):
    """The device is in a state no further step can run in."""


class Engine:
    """Owns the model, its KV cache and the requests on it; single-threaded.

    ``add`` and ``abort`` take effect at the next ``step``.
    """

    def __init__(self, model: Decoder, cache: KVCache, limits: Limits) -> None:
        self.model = model
        self.cache = cache
        self.limits = limits
        assert max(cache.groups) < limits.groups, f"{limits.groups} groups for {cache.groups}"
        self.state = State(BlockPool(cache.keys[0].shape[0]))
        self.runner = Runner(model, cache, limits)
        self._rows: dict[int, SampleRow] = {}
        self._launched: Launched | None = None  # the step that is not booked yet

    @property
    def idle(self) -> bool:
        return self.state.idle and self._launched is None

    def add(self, request: EngineRequest) -> TokenEvent | None:
        """Queue a request; an event tells at once when it can never run."""
        try:
            request.params.validate(self.model.config.vocab_size)
            self._check_ids(request.prompt_ids)
            seq = scheduler.add(self.state, self.limits, request)
        except Exception as error:
            return TokenEvent(request.id, [], finish_reason="error", error=str(error))
        self._rows[request.id] = SampleRow(
            params=request.params,
            prompt_ids=request.prompt_ids,
            output_ids=seq.output_ids,
            dry_breaker_ids=request.dry_breaker_ids,
        )
        return None

    def abort(self, request_id: int) -> TokenEvent | None:
        """Drop a request and free its blocks; None when it is not alive."""
        seq = self.state.by_id.get(request_id)
        if seq is None:
            return None
        self._finish(seq, "abort")
        return TokenEvent(request_id, [], finish_reason="abort")

    def step(self) -> list[TokenEvent]:
        """Launch one model step and book the last one; returns what became of the requests in it.

        An exception inside the step ends the requests that were in it with an error event.
        Raises EngineError when the device itself is lost.
        """
        scheduler.slide(self.state, self.limits)
        plan = scheduler.plan(self.state, self.limits)
        scheduler.apply(self.state, plan)
        before, self._launched = self._launched, None
        events: list[TokenEvent] = []
        if plan.chunks:
            try:
                self._launched = self._launch(plan)
            except Exception as error:
                events = self._fail([chunk.seq for chunk in plan.chunks], error)
        events = self._finish_step(before) + events
        if self._launched is not None and not self._launched.deferred:
            step, self._launched = self._launched, None
            events += self._finish_step(step)
        return events

    def _launch(self, plan: Plan) -> Launched:
        rows = [self._rows[chunk.seq.request.id] for chunk in plan.chunks if chunk.samples]
        return self.runner.launch(plan.chunks, rows)

    def _finish_step(self, step: Launched | None) -> list[TokenEvent]:
        """Wait for a step's tokens and book them."""
        if step is None or not step.chunks:
            return []
        try:
            sampled = self.runner.finish(step)
        except Exception as error:
            return self._fail([chunk.seq for chunk in step.chunks], error)
        alive = [row for row, chunk in enumerate(step.chunks) if chunk.seq.finish_reason is None]
        return [self._book(step.chunks[row], sampled, row) for row in alive]

    def _book(self, chunk: Chunk, sampled: SampleOutput, row: int) -> TokenEvent:
        """Take one sampled token into its sequence."""
        request_id = chunk.seq.request.id
        error = sampled.errors.get(row)
        if error is not None:
            self._finish(chunk.seq, "error")
            return TokenEvent(request_id, [], finish_reason="error", error=error)
        token = sampled.token_ids[row]
        reason = scheduler.apply_results(self.state, chunk, token)
        if reason is not None:
            self._rows.pop(request_id, None)
        stopped = chunk.seq.stop_token is not None
        logprobs: list[TokenLogprob] | None = None
        if chunk.seq.request.params.logprobs is not None:
            entry = sampled.logprobs[row] if sampled.logprobs else None
            logprobs = [] if stopped or entry is None else [entry]
        return TokenEvent(
            request_id,
            [] if stopped else [token],
            logprobs,
            reason,
            chunk.seq.stop_token,
        )

    def _finish(self, seq: Seq, reason: str) -> None:
        scheduler.finish(self.state, seq, reason)
        self._rows.pop(seq.request.id, None)

    def _fail(self, sequences: Sequence[Seq], error: Exception) -> list[TokenEvent]:
        """End every request of a step that raised, and see whether the device still works."""
        log.error("step failed: %s", error, exc_info=error)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"the step failed: {type(error).__name__}: {first_line}"
        alive = [seq for seq in sequences if seq.finish_reason is None]
        for seq in alive:
            self._finish(seq, "error")
        if self.model.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.model.device)
                torch.cuda.empty_cache()
            except Exception as lost:
                raise EngineError(f"{self.model.device} is lost: {lost}") from error
        return [
            TokenEvent(seq.request.id, [], finish_reason="error", error=message) for seq in alive
        ]

    def _check_ids(self, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.model.config.vocab_size):
            raise ValueError(
                f"prompt token ids must be in 0..{self.model.config.vocab_size - 1}, "
                f"found {min(ids) if min(ids) < 0 else max(ids)}"
            )


def run_loop(
    engine: Engine,
    receive: Callable[[bool], bool],
    emit: Callable[[list[TokenEvent]], None],
) -> None:
    """Serve until ``receive`` returns False.

    ``receive(block)`` passes what has arrived to the engine; with ``block`` it waits for
    something. ``emit`` gets each step's events. Idle time goes into graphs still to be captured.
    """
    while receive(engine.idle and not engine.runner.capture_one()):
        if not engine.idle:
            events = engine.step()
            if events:
                emit(events)
            if engine.idle:
                engine.runner.release()


def probe_batch(model: Decoder, tokens: int, seqs: int, block_size: int) -> Batch:
    """The heaviest legal step: ``tokens`` prompt tokens, logits of ``seqs`` rows.

    They are one sequence, however long sequences may be. Nothing is stored (slots are negative);
    attention reads the first blocks of the cache.
    """
    device = model.device
    blocks = -(-tokens // block_size)
    return Batch(
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.arange(tokens, device=device) % len(model.ropes[0]),
        slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        logit_rows=torch.arange(min(seqs, tokens), device=device),
        max_query_len=tokens,
        max_context_len=tokens,
        query_lens=(tokens,),
        contexts=(tokens,),
    )
