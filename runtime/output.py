"""Token events to text: incremental detokenization, stop strings, logprobs as the APIs show them.

Stop strings are looked for in the text, character by character as it becomes final, so it makes
no difference how tokens or events cut it. The first place where any stop string *ends* stops the
sequence; of several ending there the longest counts; the text before it is the output. Text that
may be the beginning of a stop string is held back until it is decided. All is linear in the
length of the text, by the automaton of Aho and Corasick (Comm. ACM 18(6), 1975).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from squall.loaders.tokenizer import Tokenizer
from squall.runtime.params import SamplingParams
from squall.runtime.request import TokenEvent, TokenLogprob

MIN_LOGPROB = -9999.0  # stands for -inf, which JSON cannot say; the OpenAI API's own value


@dataclass(frozen=True)
class Logprob:
    """One generated token as the APIs show it."""

    token: str
    token_id: int
    logprob: float  # natural log, >= MIN_LOGPROB
    bytes: bytes
    top: tuple["Logprob", ...] = ()  # likeliest first


@dataclass(frozen=True)
class Delta:
    """What one event adds to the output of one sequence.

    ``text`` may lag behind ``token_ids`` (incomplete characters, a possible stop string) and
    catches up with the last delta at the latest.
    """

    index: int  # which of the n sequences
    text: str  # new final text; "" is possible
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]  # one per token id; empty when not asked for
    finish_reason: str | None  # "stop" | "length" | "abort" | "error" | None
    stop_reason: str | int | None = None  # the stop string or stop_token_ids entry that ended it
    error: str | None = None


class StopStrings:
    """The automaton of a set of stop strings: immutable, may be shared by many matchers.

    States are the prefixes of the stop strings, state 0 the empty one; after some text the
    automaton is in the longest state that the text ends with.
    """

    __slots__ = ("_fail", "_next", "_prefix_of", "depth", "first", "stop")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        self.depth = [0]  # length of the state
        self.stop: list[str | None] = [None]  # the longest stop string the state ends with
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]  # the longest proper suffix of the state that is a state
        self._prefix_of = [""]  # a stop string that begins with the state
        for stop in stops:
            self._add(stop)
        self.first = frozenset(self._next[0])  # the characters that leave state 0
        self._link()

    def _add(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string is empty; it must have at least one character")
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.stop.append(None)
                self._fail.append(0)
                self._prefix_of.append(stop)
            state = self._next[state][character]
        self.stop[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())  # breadth first: what _fail leads to is done
        while queue:
            state = queue.popleft()
            if self.stop[state] is None:
                self.stop[state] = self.stop[self._fail[state]]
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                queue.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after one more character; O(1) amortized over a text."""
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fail[state]
        return self._next[state][character]

    def prefix(self, state: int, length: int) -> str:
        """The first ``length`` (<= depth) characters of a state, in O(length)."""
        return self._prefix_of[state][:length]


class StopMatcher:
    """Finds the first stop string in one text that comes in pieces, holding back what may be the
    beginning of one."""

    __slots__ = ("_state", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; returns the text that has become certain and the stop string met, if any.
        After a match there is nothing more to push or flush."""
        stops = self._stops
        before = state = self._state
        if state == 0 and stops.first.isdisjoint(text):  # the usual piece, at C speed
            return text, None
        stop = None
        for i, character in enumerate(text):
            state = stops.step(state, character)
            stop = stops.stop[state]
            if stop is not None:
                text = text[: i + 1]
                break
        self._state = 0 if stop is not None else state
        keep = stops.depth[state] if stop is None else len(stop)
        count = stops.depth[before] + len(text) - keep
        # Not (held + text)[:count]: that would copy a long held text for every character.
        from_held = min(count, stops.depth[before])
        return stops.prefix(before, from_held) + text[: count - from_held], stop

    def flush(self) -> str:
        """The text still held back, once no more comes."""
        state, self._state = self._state, 0
        return self._stops.prefix(state, self._stops.depth[state])


class OutputStream:
    """Text and logprobs of one sequence, from its token events."""

    __slots__ = (
        "_closed",
        "_index",
        "_logprobs",
        "_matcher",
        "_stop_ids",
        "_text",
        "_tokenizer",
        "matched_stop",
    )

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        stops: StopStrings | None = None,
    ) -> None:
        """``index``: which of the request's ``n`` sequences. ``stops``: ``params.stop``, built
        once for all of them; built here when it is not given.
        """
        self._index = index
        self._tokenizer = tokenizer
        self._logprobs = params.logprobs is not None
        self._stop_ids = frozenset(params.stop_token_ids)
        self._matcher: StopMatcher | None = None
        if params.stop:
            self._matcher = StopMatcher(StopStrings(params.stop) if stops is None else stops)
        self._text = tokenizer.stream()
        self._closed = False
        # A stop string was met: the caller must abort the engine's request. Later events give
        # empty deltas without a finish reason.
        self.matched_stop = False

    def feed(self, event: TokenEvent) -> Delta:
        """What ``event`` adds.

        When a stop string is met, the delta ends with the token that completed it and has
        ``finish_reason`` ``"stop"``; the event's further tokens are dropped.
        """
        if self.matched_stop:
            return Delta(self._index, "", (), (), None)
        assert not self._closed, f"request {event.id}: an event after the one that finished it"
        pieces: list[str] = []
        stop: str | None = None
        taken = 0
        for token_id in event.token_ids:
            taken += 1
            stop = self._push(self._text.push(token_id), pieces)
            if stop is not None:
                break
        finish_reason = event.finish_reason
        if stop is None and finish_reason is not None:
            self._closed = True
            stop = self._push(self._text.flush(), pieces)
            if stop is None and self._matcher is not None:
                pieces.append(self._matcher.flush())
        stop_reason: str | int | None = event.stop_token
        if stop is not None:
            self.matched_stop = True
            finish_reason, stop_reason = "stop", stop
        elif stop_reason not in self._stop_ids:  # the model's own end is not a reason of its own
            stop_reason = None
        return Delta(
            index=self._index,
            text="".join(pieces),
            token_ids=tuple(event.token_ids[:taken]),
            logprobs=self._show(event, taken),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=event.error,
        )

    def _push(self, text: str, pieces: list[str]) -> str | None:
        """Append what of ``text`` is certain; returns the stop string met."""
        if self._matcher is None:
            pieces.append(text)
            return None
        certain, stop = self._matcher.push(text)
        pieces.append(certain)
        return stop

    def _show(self, event: TokenEvent, count: int) -> tuple[Logprob, ...]:
        if not self._logprobs:
            return ()
        entries = event.logprobs or []
        assert len(entries) == len(event.token_ids), (
            f"request {event.id}: {len(entries)} logprobs for {len(event.token_ids)} tokens"
        )
        return tuple(self._entry(entry) for entry in entries[:count])

    def _entry(self, entry: TokenLogprob) -> Logprob:
        top = tuple(self._single(token_id, logprob) for token_id, logprob in entry.top)
        return self._single(entry.token_id, entry.logprob, top)

    def _single(self, token_id: int, logprob: float, top: tuple[Logprob, ...] = ()) -> Logprob:
        return Logprob(
            token=self._tokenizer.token_text(token_id),
            token_id=token_id,
            logprob=max(logprob, MIN_LOGPROB),
            bytes=self._tokenizer.token_bytes(token_id),
            top=top,
        )
