"""Which tokens the next step computes: continuous batching over a paged KV cache.

``slide`` gives back the blocks that no further step reads; ``plan`` decides and only reads;
``apply`` carries the decision out and counts the step as computed; ``apply_results`` books what it
produced, which may come after the next step was planned: the tokens between are in flight, their
number is known and their values are not. A sequence whose token in flight turns out to end it has
then been computed for one step too many. Nothing here knows tensors; a step costs O(running
sequences), whatever their lengths.

Order is priority first (higher wins), then arrival; ``State.running`` and ``State.waiting`` are
kept in that order. A step takes, within the token budget:

1. one token of every running sequence that has only its newest token left to compute (decode);
2. chunks of running sequences that are still being computed (prefill), in order;
3. chunks of waiting sequences, in order and without overtaking.

A running sequence that finds no block for even one token takes the blocks of the last ones in
order: they are preempted, lose their cache, and wait again with their output kept, to have prompt
and output recomputed. The first running sequence therefore progresses in every step, and (as
``add`` refuses what could not fit alone) every sequence is at some point the first. A sequence
with none behind it waits for blocks with its cache kept.

Admission must not feed preemption, so a waiting sequence starts only when all its known tokens
and one further block per running sequence fit into the free blocks, and after a preemption nobody
starts until a running sequence has left.

Layers with windows (``Limits.windows``) keep fewer blocks than their sequence is long, in tables of
their own. A sequence grows in all groups of layers at once, so it is one further block of each that
"one further block" means. What a chunk takes beyond the window is given back a step later: it must
not cost others their cache, so the chunk is shortened to leave them their further blocks.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from squall.kernels.attention.window import first_key
from squall.runtime.pages import BlockPool, blocks_for, blocks_needed, longest_sequence
from squall.runtime.request import EngineRequest, Sequence


class QueueFullError(Exception):
    """There are ``limit`` unfinished requests, as many as may run and wait."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the queue is full: the limit is {limit} unfinished requests")
        self.limit = limit


class RequestTooLargeError(ValueError):
    """A request that could never run: it may need ``tokens``, ``limit`` is what there is."""

    def __init__(self, message: str, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


@dataclass(frozen=True)
class Limits:
    """What a step and the queue may hold. ValueError for a value that is out of range."""

    max_seqs: int  # running sequences
    token_budget: int  # tokens a step computes; >= max_seqs, so that decodes always fit
    block_size: int  # tokens per cache block
    max_queue: int  # unfinished requests that add() accepts beyond max_seqs
    max_seq_len: int  # tokens of a sequence, prompt and output
    windows: tuple[int, ...] = (0,)  # of each group of layers (squall.kernels.attention.window)

    def __post_init__(self) -> None:
        for name in ("max_seqs", "token_budget", "block_size", "max_queue", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.token_budget < self.max_seqs:
            raise ValueError(
                f"token_budget is {self.token_budget}; it must be at least "
                f"max_seqs ({self.max_seqs})"
            )

    @property
    def groups(self) -> int:
        """Block tables of a sequence."""
        return len(self.windows)


@dataclass
class State:
    """All sequences that are alive; changed only by this module's functions."""

    pool: BlockPool
    waiting: deque[Sequence] = field(default_factory=deque)  # hold no blocks
    running: list[Sequence] = field(default_factory=list)
    by_id: dict[int, Sequence] = field(default_factory=dict)  # request id -> waiting or running
    admitting: bool = True  # False from a preemption until a running sequence leaves
    arrivals: int = 0  # requests ever added
    preemptions: int = 0  # ever

    @property
    def idle(self) -> bool:
        """Nothing is running or waiting."""
        return not self.by_id


class Chunk(NamedTuple):
    """Tokens ``[start, start + length)`` of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    length: int
    samples: bool  # they reach the newest known token: a next one is sampled
    new_blocks: int  # to allocate first, for each group of layers

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Plan:
    """One step. Block tables are right after ``apply``; until then nothing has changed."""

    chunks: tuple[Chunk, ...] = ()  # decodes first, then prefills; at most one per sequence
    admitted: tuple[Sequence, ...] = ()  # from the front of the waiting queue; each has a chunk
    preempted: tuple[Sequence, ...] = ()  # from the end of the running list, last one first

    @property
    def tokens(self) -> int:
        """Tokens this step computes."""
        return sum(chunk.length for chunk in self.chunks)


def add(state: State, limits: Limits, request: EngineRequest) -> Sequence:
    """Queue a request and return its sequence.

    Raises QueueFullError when ``max_seqs + max_queue`` are unfinished (not when ``max_queue`` are
    waiting: a burst waits as a whole until the next step), RequestTooLargeError when the prompt
    is longer than ``max_seq_len`` or the sequence could outgrow the whole pool, ValueError for an
    empty prompt or an id that is alive.
    """
    prompt = len(request.prompt_ids)
    if prompt == 0:
        raise ValueError(f"request {request.id} has an empty prompt")
    if request.id in state.by_id:
        raise ValueError(f"request id {request.id} is already in use")
    if prompt > limits.max_seq_len:
        raise RequestTooLargeError(
            f"the prompt has {prompt} tokens, the context length is {limits.max_seq_len}",
            prompt,
            limits.max_seq_len,
        )
    wanted = request.params.max_tokens
    ends = limits.max_seq_len if wanted is None else min(prompt + wanted, limits.max_seq_len)
    max_length = max(ends, prompt + 1)  # a prompt that fills the context still gets one token
    cached = max_length - 1  # the last token is never fed back
    blocks, block_size = state.pool.num_blocks, limits.block_size
    if blocks_needed(cached, block_size, limits.windows) > blocks:
        capacity = longest_sequence(cached, blocks, block_size, limits.windows)
        raise RequestTooLargeError(
            f"the request may need {cached} tokens of KV cache ({prompt} of prompt), the whole "
            f"cache holds {capacity}",
            cached,
            capacity,
        )
    if len(state.by_id) >= limits.max_seqs + limits.max_queue:
        raise QueueFullError(limits.max_seqs + limits.max_queue)
    seq = Sequence(request, state.arrivals, max_length, limits.groups)
    state.arrivals += 1
    state.by_id[request.id] = seq
    _insert_from_back(state.waiting, seq)
    return seq


def slide(state: State, limits: Limits) -> None:
    """Give back what has left the windows. To be called before ``plan``: a block that is taken by
    the next step may still be read by the one under way, which the device finishes first."""
    if not any(limits.windows):
        return
    for seq in state.running:
        for group, window in enumerate(limits.windows):
            # the next token to be computed is also the first that is still to look back
            first = first_key(seq.computed, window) // limits.block_size
            slid = seq.slid[group]
            if first > slid:
                table = seq.blocks[group]
                state.pool.free(table[slid:first])
                table[slid:first] = [-1] * (first - slid)
                seq.slid[group] = first


def plan(state: State, limits: Limits) -> Plan:
    """Decide the next step; changes nothing. The plan is empty only when the state is idle or all
    that is left to do is to book tokens in flight."""
    running = state.running
    block_size, groups = limits.block_size, limits.groups
    sliding = any(limits.windows)
    free = state.pool.free_blocks
    # Decodes go first in the budget; the prefills share the rest. Were a running sequence to
    # prefill, fewer than max_seqs decode, so there is a rest.
    budget = limits.token_budget - sum([s.remaining == 1 for s in running])
    decodes: list[Chunk] = []
    prefills: list[Chunk] = []
    keep = len(running)  # running[keep:] are preempted
    i = 0
    while i < keep:
        seq = running[i]
        i += 1
        start = seq.computed
        remaining = seq.remaining
        length = 1 if remaining == 1 else min(remaining, budget)
        if length == 0:
            continue
        room = len(seq.blocks[0]) * block_size - start  # tokens, without a new block
        new_blocks = 0
        if length > room:
            while room == 0 and free < groups and keep > i:
                keep -= 1
                free += running[keep].held
            usable = free // groups
            if sliding:  # leave the rest their next ones
                usable = max(usable - (keep - i), min(usable, 1))
            length = min(length, room + usable * block_size)
            if length == 0:
                continue
            new_blocks = blocks_for(length - room, block_size)
            free -= new_blocks * groups
        chunk = Chunk(seq, start, length, length == remaining, new_blocks)
        if remaining == 1:
            decodes.append(chunk)
        else:
            prefills.append(chunk)
            budget -= length
    preempted = tuple(reversed(running[keep:]))
    starts: list[Chunk] = []
    if state.admitting and not preempted:
        starts = _admissions(state, limits, free, budget)
    return Plan(
        chunks=tuple(decodes + prefills + starts),
        admitted=tuple(chunk.seq for chunk in starts),
        preempted=preempted,
    )


def _admissions(state: State, limits: Limits, free: int, budget: int) -> list[Chunk]:
    """First chunks of the waiting sequences that may start now.

    All the known tokens of each must fit, not just its chunk: a prompt that is let in and then
    finds no block for its middle would lose all of it to the next preemption.
    """
    starts: list[Chunk] = []
    running, block_size, groups = len(state.running), limits.block_size, limits.groups
    for seq in state.waiting:
        needed = blocks_needed(len(seq.tokens), block_size, limits.windows)
        spare = free - running * groups
        if running >= limits.max_seqs or budget == 0 or needed > spare or seq.in_flight:
            break
        length = min(len(seq.tokens), budget, spare // groups * block_size)
        new_blocks = blocks_for(length, block_size)
        chunk = Chunk(seq, 0, length, length == len(seq.tokens), new_blocks)
        starts.append(chunk)
        running += 1
        budget -= length
        free -= new_blocks * groups
    return starts


def apply(state: State, plan: Plan) -> None:
    """Carry out the plan made from this very state: preempt, admit, allocate blocks."""
    for seq in plan.preempted:
        assert state.running[-1] is seq, f"{seq} is not the last running sequence"
        state.running.pop()
        _free_all(state, seq)
        seq.computed = 0
        seq.preemptions += 1
        _insert_from_front(state.waiting, seq)
    if plan.preempted:
        state.admitting = False
        state.preemptions += len(plan.preempted)
    for seq in plan.admitted:
        assert state.waiting[0] is seq, f"{seq} is not the first waiting sequence"
        insort(state.running, state.waiting.popleft(), key=_order)
    for chunk in plan.chunks:
        if chunk.new_blocks:
            for table in chunk.seq.blocks:
                table += state.pool.allocate(chunk.new_blocks)
        chunk.seq.computed = chunk.end
        chunk.seq.in_flight += chunk.samples


def apply_results(state: State, chunk: Chunk, token: int) -> str | None:
    """Book the token sampled after a chunk.

    Returns the finish reason if the token ended the sequence, which has then left the state. The
    result of a sequence that was finished or aborted in the meantime is dropped (None).
    """
    seq = chunk.seq
    if seq.finish_reason is not None:
        return None
    assert chunk.samples, f"{seq}: token {token} of a chunk that does not sample"
    seq.in_flight -= 1
    reason = seq.accept(token)
    if reason is not None:
        finish(state, seq, reason)
    return reason


def finish(state: State, seq: Sequence, reason: str) -> None:
    """End a sequence, running or waiting, and free its blocks.

    ``reason`` is a finish reason of ``TokenEvent``. Ending it twice is an AssertionError.
    """
    assert state.by_id.pop(seq.request.id, None) is seq, f"{seq} is not alive"
    seq.finish_reason = reason
    if seq.blocks[0]:  # exactly the running ones have blocks
        state.running.remove(seq)
        _free_all(state, seq)
        state.admitting = True
    else:
        state.waiting.remove(seq)


def abort(state: State, request_id: int) -> Sequence | None:
    """End a request with ``"abort"``; None when no such request is alive."""
    seq = state.by_id.get(request_id)
    if seq is not None:
        finish(state, seq, "abort")
    return seq


def _free_all(state: State, seq: Sequence) -> None:
    for table, slid in zip(seq.blocks, seq.slid, strict=True):
        state.pool.free(table[slid:])
        table.clear()
    seq.slid = [0] * len(seq.blocks)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


def _insert_from_back(waiting: deque[Sequence], seq: Sequence) -> None:
    """Insert by order; O(1) for a new arrival of the lowest priority there is."""
    i = len(waiting)
    while i > 0 and waiting[i - 1].order > seq.order:
        i -= 1
    waiting.insert(i, seq)


def _insert_from_front(waiting: deque[Sequence], seq: Sequence) -> None:
    """Insert by order; O(1) for a preempted one: it came before those that never ran."""
    i = 0
    while i < len(waiting) and waiting[i].order < seq.order:
        i += 1
    waiting.insert(i, seq)
