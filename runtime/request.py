"""A request: what crosses between front-end and engine, and what the engine knows about it.

The Structs travel as msgpack arrays over the socket pair. ``Sequence`` never leaves the engine.
"""

import msgspec

from squall.runtime.params import SamplingParams


class EngineRequest(msgspec.Struct, array_like=True, frozen=True):
    """One sequence to generate (front-end -> engine); ``n`` choices are ``n`` requests."""

    id: int  # unique among the requests that are alive
    prompt_ids: list[int]  # never empty
    params: SamplingParams
    eos_ids: list[int]  # ids that end generation unless params.ignore_eos
    dry_breaker_ids: list[list[int]]  # params.dry_sequence_breakers as token ids
    priority: int = 0  # higher runs first


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Natural-log probability of one generated token and of the likeliest ones at its place."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (id, logprob), likeliest first; empty when not asked for


class TokenEvent(msgspec.Struct, array_like=True, frozen=True):
    """What one step did for one request (engine -> front-end)."""

    id: int
    token_ids: list[int]  # new tokens, without the one that stopped it
    logprobs: list[TokenLogprob] | None = None  # one per token id, when asked for
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; the last event
    stop_token: int | None = None  # the EOS or stop id that ended it
    error: str | None = None  # one line, with finish_reason "error"


class Sequence:
    """The engine's mutable state of one request.

    ``tokens`` is prompt then output, as far as the host knows it; ``in_flight`` more have been
    sampled by steps whose results are not booked yet. The first ``computed`` of all these have
    their keys and values in the cache, in ``blocks``, or will have them once the launched steps
    are through. The token sampled last is not computed yet, so a sequence that is decoding has
    ``remaining == 1``.

    ``blocks`` are block tables, one for each group of layers, which are equally long: entry i is
    the block of tokens ``i * block_size`` and on. The first ``slid`` entries of a group's table are
    -1: their tokens have left its window.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "computed",
        "finish_reason",
        "in_flight",
        "max_length",
        "order",
        "output_ids",
        "preemptions",
        "request",
        "row",
        "slid",
        "stop_ids",
        "stop_token",
        "tokens",
    )

    def __init__(
        self, request: EngineRequest, arrival: int, max_length: int, groups: int = 1
    ) -> None:
        """``arrival`` counts requests; ``max_length`` is where ``tokens`` must end (tokens);
        ``groups`` are the groups of layers."""
        params = request.params
        # for the life of the request
        self.request = request
        self.arrival = arrival
        self.order = (-request.priority, arrival)  # the lowest is served first
        self.max_length = max_length
        self.stop_ids = frozenset(params.stop_token_ids).union(
            () if params.ignore_eos else request.eos_ids
        )
        # grows as it runs
        self.tokens = list(request.prompt_ids)
        self.output_ids: list[int] = []
        self.in_flight = 0
        self.row = -1  # its row among those the last step that sampled it sampled
        self.preemptions = 0
        # given up when it is preempted
        self.computed = 0
        self.blocks: list[list[int]] = [[] for _ in range(groups)]
        self.slid = [0] * groups
        # set once
        self.finish_reason: str | None = None
        self.stop_token: int | None = None

    @property
    def remaining(self) -> int:
        """Tokens to compute next: those sampled so far that are not in the cache. None once the
        last token it may have is in flight."""
        length = len(self.tokens) + self.in_flight
        return 0 if self.in_flight and length >= self.max_length else length - self.computed

    @property
    def held(self) -> int:
        """Blocks it has, of all groups together."""
        return sum(map(len, self.blocks)) - sum(self.slid)

    @property
    def sampled(self) -> int:
        """Output tokens sampled so far, those in flight included."""
        return len(self.output_ids) + self.in_flight

    def accept(self, token: int) -> str | None:
        """Take the next sampled token; returns the reason if it ends the sequence.

        A stop id (EOS or ``stop_token_ids``) ends it with ``"stop"`` and does not become part of
        the output; reaching ``max_length`` ends it with ``"length"``.
        """
        if token in self.stop_ids:
            self.stop_token = token
            return "stop"
        self.tokens.append(token)
        self.output_ids.append(token)
        return "length" if len(self.tokens) >= self.max_length else None

    def __repr__(self) -> str:
        return (
            f"Sequence(id={self.request.id}, computed={self.computed}/{len(self.tokens)}, "
            f"blocks={self.held}, finish_reason={self.finish_reason})"
        )
