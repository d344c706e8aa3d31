"""Log-probabilities in the two forms of the OpenAI API."""

import codecs
from collections.abc import Iterable

import msgspec

from squall.runtime.output import MIN_LOGPROB, Logprob


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None  # of the text it stands for; None for tokens without text


class ChatLogprob(TopLogprob, frozen=True):
    """One generated token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """``choices[].logprobs`` of chat completions."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """``choices[].logprobs`` of completions: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]  # always includes the generated token
    text_offset: list[int]  # characters


def finite(logprob: float) -> float:
    """``logprob`` as JSON can say it: -inf and NaN become -9999."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def chat_logprobs(entries: Iterable[Logprob]) -> ChatLogprobs:
    """The chat form."""
    return ChatLogprobs(
        [
            ChatLogprob(
                entry.token,
                finite(entry.logprob),
                list(entry.bytes) or None,
                [
                    TopLogprob(top.token, finite(top.logprob), list(top.bytes) or None)
                    for top in entry.top
                ],
            )
            for entry in entries
        ]
    )


class OffsetCounter:
    """Where in a choice's text each of its tokens begins, over any number of calls."""

    def __init__(self, start: int = 0) -> None:
        """``start``: characters before the first token (an echoed prompt)."""
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def completion_logprobs(self, entries: Iterable[Logprob]) -> CompletionLogprobs:
        """The completions form of the next tokens."""
        shown = CompletionLogprobs([], [], [], [])
        for entry in entries:
            token = _legacy_token(entry)
            shown.tokens.append(token)
            shown.token_logprobs.append(finite(entry.logprob))
            top: dict[str, float] = {}
            for candidate in entry.top:  # likeliest first: of two equal spellings it stays
                top.setdefault(_legacy_token(candidate), finite(candidate.logprob))
            top[token] = finite(entry.logprob)
            shown.top_logprobs.append(top)
            shown.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(entry.bytes))
        return shown


def _legacy_token(entry: Logprob) -> str:
    """The token as text; bytes that are no whole characters as ``bytes:\\xe2\\x82``."""
    try:
        entry.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
    return entry.token
