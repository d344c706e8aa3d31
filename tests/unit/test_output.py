"""Text, stop strings and logprobs from token events, with a byte tokenizer made up here."""

import codecs
import itertools
import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.runtime.output import Delta, Logprob, OutputStream, StopMatcher, StopStrings
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, TokenEvent, TokenLogprob

EOS = 0


class ByteStream:
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceTokenizer:
    """Token ``i`` is ``pieces[i]``; token 0 is the end of the sequence."""

    bos_id: int | None = None
    eos_id: int | None = EOS
    unk_id: int | None = None
    eos_ids = special_ids = frozenset({EOS})

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = [b"", *pieces]
        self.vocab_size = len(self.pieces)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.pieces[token_id].decode(errors="replace") or "<eos>"

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def token_id(self, text: str) -> int | None:
        return self.pieces.index(text.encode()) if text.encode() in self.pieces else None

    def stream(self, *, skip_special: bool = True) -> ByteStream:
        return ByteStream(self.pieces)


def feed_all(
    pieces: Sequence[str | bytes],
    stop: tuple[str, ...],
    *,
    finish_reason: str = "length",
    per_event: int = 1,
) -> tuple[OutputStream, list[Delta]]:
    """One token per piece, ``per_event`` tokens per event, until the stream has ended."""
    raw = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    stream = OutputStream(3, PieceTokenizer(raw), SamplingParams(stop=stop))
    ids = list(range(1, len(raw) + 1))
    deltas: list[Delta] = []
    for first in range(0, max(len(ids), 1), per_event):
        is_last = first + per_event >= len(ids)
        batch = ids[first : first + per_event]
        event = TokenEvent(1, batch, finish_reason=finish_reason if is_last else None)
        deltas.append(stream.feed(event))
        if stream.matched_stop:
            break
    return stream, deltas


def texts(deltas: list[Delta]) -> list[str]:
    return [delta.text for delta in deltas]


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The definition: where a stop string first ends, the longest one ending there counts."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_text_passes_through_without_stop_strings() -> None:
    _, deltas = feed_all(["Hel", "lo", " you"], ())
    assert texts(deltas) == ["Hel", "lo", " you"]
    assert [delta.token_ids for delta in deltas] == [(1,), (2,), (3,)]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    assert {(d.index, d.logprobs, d.stop_reason, d.error) for d in deltas} == {(3, (), None, None)}


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "END", "cd"], ("END",), ["ab", ""]),  # a token of its own
        (["a", "bENDc", "d"], ("END",), ["a", "b"]),  # inside one token
        (["ab", "E", "N", "D", "x"], ("END",), ["ab", "", "", ""]),  # over many
        (["abE", "Nx", "END"], ("END",), ["ab", "ENx", ""]),  # a false beginning first
        (["aE", "EN", "D"], ("END",), ["a", "E", ""]),  # a beginning within a beginning
        (["ababab", "ac"], ("ababac",), ["ab", ""]),
        (["xabc", "d"], ("abcde", "bc"), ["xa"]),  # the shorter ends first
        (["xabcd", "e"], ("abcde", "bx"), ["x", ""]),
        (["xab"], ("b", "ab"), ["x"]),  # both end here: the longer counts
        (["END"], ("END",), [""]),
        (["a\n", "\n", "b"], ("\n\n", "###"), ["a", ""]),
        (["né", "né!"], ("é!",), ["n", "én"]),
    ],
)
def test_stop_strings(pieces: list[str], stop: tuple[str, ...], shown: list[str]) -> None:
    stream, deltas = feed_all(pieces, stop)
    assert texts(deltas) == shown
    assert stream.matched_stop
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason in stop
    assert (
        "".join(texts(deltas)),
        deltas[-1].stop_reason,
    ) == cut("".join(pieces), stop)


def test_a_stop_string_over_split_characters() -> None:
    heart, euro = "♥".encode(), "€".encode()
    pieces = [b"a" + heart[:1], heart[1:] + euro[:2], euro[2:], b"b"]
    _, deltas = feed_all(pieces, ("♥€",))
    assert texts(deltas) == ["a", "", ""]
    assert deltas[-1].stop_reason == "♥€"


def test_what_was_held_back_is_flushed_at_the_end() -> None:
    stream, deltas = feed_all(["ab", "E", "N"], ("END",))
    assert texts(deltas) == ["ab", "", "EN"]
    assert (stream.matched_stop, deltas[-1].finish_reason) == (False, "length")


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    _, deltas = feed_all([b"aE", "€".encode()[:2]], ("END",))
    assert texts(deltas) == ["a", "E\ufffd"]


def test_the_flushed_text_may_complete_a_stop_string() -> None:
    stream, deltas = feed_all([b"a", "€".encode()[:2]], ("\ufffd",))
    assert texts(deltas) == ["a", ""]
    assert stream.matched_stop
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "\ufffd")


def test_tokens_after_the_match_are_dropped() -> None:
    stream, deltas = feed_all(["a", "EN", "Dz", "b", "c"], ("END",), per_event=5)
    assert [(d.text, d.token_ids, d.finish_reason) for d in deltas] == [("a", (1, 2, 3), "stop")]
    late = stream.feed(TokenEvent(1, [4], finish_reason="abort"))
    assert late == Delta(3, "", (), (), None)


def test_a_match_in_the_last_event_wins_over_its_own_reason() -> None:
    _, deltas = feed_all(["a", "END"], ("END",), finish_reason="length")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")


def test_an_event_after_the_last_one_is_refused() -> None:
    stream, _ = feed_all(["a"], ())
    with pytest.raises(AssertionError, match="request 1: an event after the one that finished it"):
        stream.feed(TokenEvent(1, [1]))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least one character"):
        StopStrings(("a", ""))


@pytest.mark.parametrize(("stop_token", "reason"), [(EOS, None), (2, 2)])
def test_stop_ids_are_a_reason_and_the_end_of_turn_is_not(
    stop_token: int, reason: int | None
) -> None:
    params = SamplingParams(stop=("END",), stop_token_ids=(2,))
    stream = OutputStream(0, PieceTokenizer([b"xEN", b"b"]), params)
    assert stream.feed(TokenEvent(1, [1])).text == "x"
    delta = stream.feed(TokenEvent(1, [], finish_reason="stop", stop_token=stop_token))
    assert delta == Delta(0, "EN", (), (), "stop", reason)
    assert not stream.matched_stop


def test_errors_are_passed_on_with_the_text_so_far() -> None:
    stream = OutputStream(0, PieceTokenizer([b"xE"]), SamplingParams(stop=("END",)))
    stream.feed(TokenEvent(1, [1]))
    delta = stream.feed(TokenEvent(1, [], finish_reason="error", error="logits are NaN"))
    assert delta == Delta(0, "E", (), (), "error", None, "logits are NaN")


def test_logprobs_are_one_per_token_and_end_with_the_match() -> None:
    tokenizer = PieceTokenizer([b"a", b"E", b"ND", "€".encode()[:2]])
    stream = OutputStream(0, tokenizer, SamplingParams(stop=("END",), logprobs=2))
    entries = [
        TokenLogprob(1, -0.5, [(1, -0.5), (4, -math.inf)]),
        TokenLogprob(2, -math.inf, []),
        TokenLogprob(3, -2.0, [(1, -1.0)]),
        TokenLogprob(1, -3.0, []),
    ]
    first = stream.feed(TokenEvent(1, [1, 2], entries[:2]))
    assert first.logprobs == (
        Logprob(
            "a",
            1,
            -0.5,
            b"a",
            (Logprob("a", 1, -0.5, b"a"), Logprob("\ufffd", 4, -9999.0, b"\xe2\x82")),
        ),
        Logprob("E", 2, -9999.0, b"E"),
    )
    last = stream.feed(TokenEvent(1, [3, 1], entries[2:]))
    assert last.token_ids == (3,)
    assert last.logprobs == (Logprob("ND", 3, -2.0, b"ND", (Logprob("a", 1, -1.0, b"a"),)),)


def test_logprobs_must_match_the_tokens() -> None:
    tokenizer = PieceTokenizer([b"a"])
    stream = OutputStream(0, tokenizer, SamplingParams(logprobs=0))
    with pytest.raises(AssertionError, match="request 1: 1 logprobs for 2 tokens"):
        stream.feed(TokenEvent(1, [1, 1], [TokenLogprob(1, -1.0, [])]))
    silent = OutputStream(0, tokenizer, SamplingParams())
    assert silent.feed(TokenEvent(1, [1], [TokenLogprob(1, -1.0, [])])).logprobs == ()


def test_choices_share_one_automaton() -> None:
    params = SamplingParams(stop=("END",), n=2)
    stops = StopStrings(params.stop)
    tokenizer = PieceTokenizer([b"aE", b"ND", b"b"])
    streams = [OutputStream(i, tokenizer, params, stops) for i in range(2)]
    ids = [(1, 1), (2, 3)]
    shown = [
        [s.feed(TokenEvent(1, [i])).text for s, i in zip(streams, r, strict=True)] for r in ids
    ]
    assert shown == [["a", "a"], ["", "Eb"]]
    assert [stream.matched_stop for stream in streams] == [True, False]


def test_matching_takes_steps_in_proportion_to_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = "a" * 1000 + "b"
    stops = StopStrings((stop,))
    lookups = 0

    class Counting(dict[str, int]):
        def __contains__(self, key: object) -> bool:
            nonlocal lookups
            lookups += 1
            return super().__contains__(key)

    monkeypatch.setattr(stops, "_next", [Counting(row) for row in stops._next])
    matcher = StopMatcher(stops)
    text = ("a" * 999 + "c") * 20
    shown = "".join(matcher.push(character)[0] for character in text) + matcher.flush()
    assert shown == text
    assert lookups < 3 * len(text)


ALPHABET = "ab€\n"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=500, deadline=None)
@given(
    st.text(ALPHABET, max_size=40),
    STOPS,
    st.lists(st.integers(1, 7), min_size=1, max_size=10),
    st.integers(1, 4),
    st.sampled_from(["length", "stop", "abort", "error"]),
)
def test_any_cutting_gives_the_same_text(
    text: str, stops: tuple[str, ...], sizes: list[int], per_event: int, reason: str
) -> None:
    raw = text.encode()
    pieces: list[bytes] = []
    for size in itertools.cycle(sizes):
        if not raw:
            break
        pieces.append(raw[:size])
        raw = raw[size:]
    stream, deltas = feed_all(pieces, stops, finish_reason=reason, per_event=per_event)
    expected, stop = cut(text, stops)
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert expected.startswith(shown)  # nothing is ever taken back
        assert not any(stop in shown for stop in stops)
    assert shown == expected
    assert stream.matched_stop == (stop is not None)
    assert deltas[-1].finish_reason == ("stop" if stop is not None else reason)
    assert deltas[-1].stop_reason == stop
    taken = sum(len(delta.token_ids) for delta in deltas)
    if stop is None:
        assert taken == len(pieces)
    else:  # the token that completed the match is the last one
        decode = PieceTokenizer(pieces).decode
        complete = expected + stop
        so_far = [decode(range(1, count + 1)).rstrip("\ufffd") for count in (taken - 1, taken)]
        assert not so_far[0].startswith(complete)
        assert so_far[1].startswith(complete)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=9), max_size=5))
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for end, character in enumerate(text, 1):
        certain, stop = matcher.push(character)
        shown += certain
        if stop is not None:
            assert (shown, stop) == cut(text, stops)
            return
        held = text[len(shown) : end]
        assert text[:end] == shown + held
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert shown + matcher.flush() == text


def test_messages_survive_the_socket() -> None:
    params = SamplingParams(max_tokens=3, logit_bias={5: -1.5}, stop=("a", "b"), seed=2**63)
    request = EngineRequest(7, [1, 2, 3], params, [2, 9], [[4], [5, 6]], -3)
    event = TokenEvent(
        7, [8, 9], [TokenLogprob(8, -math.inf, [(8, -0.25), (1, -2.0)])], "error", 9, "why"
    )
    for message in (request, event, TokenEvent(1, [])):
        data = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(data, type=type(message)) == message
        assert isinstance(msgspec.msgpack.decode(data), list)
