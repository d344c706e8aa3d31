"""``SamplingParams``: what a request may ask of generation, with every value checked.

Imports no torch: the scheduler, the front-end and the command line use it.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-7  # temperatures below this pick the most likely token
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BREAKERS = 64
MAX_BREAKER_CHARS = 64
MAX_DRY_MATCH = 50
MAX_INT = 2**31 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's step


def mix64(value: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    value &= 2**64 - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return value ^ (value >> 31)


class ParamError(Exception):
    """A sampling parameter is out of range.

    ``param`` is the field's name, ``message`` one line with the field, the value and what would
    be accepted.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request is generated. Call ``validate`` before use.

    The filters run in the order: ``logit_bias``, DRY, ``repetition_penalty``,
    ``frequency_penalty`` and ``presence_penalty``, ``temperature``, ``top_k``, ``top_p``,
    ``min_p`` (see ``squall.runtime.sampler``).
    """

    max_tokens: int | None = None  # None: as many as the context length allows
    temperature: float = 1.0  # below 1e-7: greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output; 1: off
    frequency_penalty: float = 0.0  # over prompt and output
    presence_penalty: float = 0.0  # over prompt and output
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    seed: int | None = None  # None: a fresh random one
    logprobs: int | None = None  # None: off; k: of the sampled token and of the k most likely
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Let callers write one stop string, or lists for tuples."""
        for name in ("stop", "stop_token_ids", "dry_sequence_breakers"):
            value: Any = getattr(self, name)
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list):
                msgspec.structs.force_setattr(self, name, tuple(value))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a random one."""
        return self.temperature < GREEDY_BELOW

    def choice(self, index: int) -> "SamplingParams":
        """The parameters of the ``index``-th of ``n`` choices, a request of its own.

        A seeded request gives every choice a seed of its own; choice 0 keeps the given one, so
        that it equals a request with ``n=1``.
        """
        seed = self.seed
        if seed is not None and index:
            seed = mix64(seed + index * GOLDEN)
        return msgspec.structs.replace(self, n=1, seed=seed)

    def validate(self, vocab_size: int) -> None:
        """Raise ``ParamError`` for the first value that is out of range.

        ``vocab_size`` is the width of the model's logits: token ids must lie below it.
        """
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_INT)
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, -1, MAX_INT, note=" (0 or -1: off)")
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._validate_dry()
        self._validate_bias(vocab_size)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("n", self.n, 1, MAX_N)
        _strings("stop", self.stop, MAX_STOPS, MAX_STOP_CHARS)
        _sized("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS, "token ids")
        for token_id in self.stop_token_ids:
            _token_id("stop_token_ids", token_id, vocab_size)
        if not isinstance(self.ignore_eos, bool):
            raise _error("ignore_eos", self.ignore_eos, "true or false")

    def _validate_dry(self) -> None:
        _number("dry_multiplier", self.dry_multiplier, 0.0, 100.0, note=" (0: off)")
        _number("dry_base", self.dry_base, 1.0, 10.0)
        _integer("dry_allowed_length", self.dry_allowed_length, 0, MAX_DRY_MATCH)
        breakers = self.dry_sequence_breakers
        _strings("dry_sequence_breakers", breakers, MAX_BREAKERS, MAX_BREAKER_CHARS)

    def _validate_bias(self, vocab_size: int) -> None:
        if not isinstance(self.logit_bias, dict):
            raise _error("logit_bias", self.logit_bias, "a map from token id to bias")
        for token_id, bias in self.logit_bias.items():
            _token_id("logit_bias", token_id, vocab_size)
            if not _is_number(bias) or not -100.0 <= bias <= 100.0:
                accepted = "a bias from -100 to 100"
                raise ParamError(
                    "logit_bias",
                    f"logit_bias of token {token_id} is {_show(bias)}, expected {accepted}",
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: object) -> str:
    """A short one-line spelling of anything a caller may have passed."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "an integer too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def _error(param: str, value: object, accepted: str) -> ParamError:
    return ParamError(param, f"{param} is {_show(value)}, expected {accepted}")


def _number(
    param: str, value: float, low: float, high: float, *, above: bool = False, note: str = ""
) -> None:
    """Refuse what is no number in ``[low, high]`` (``(low, high]`` with ``above``), NaN too."""
    if _is_number(value) and low <= value <= high and not (above and value == low):
        return
    begin = f"above {low:g} and up to" if above else f"from {low:g} to"
    raise _error(param, value, f"a number {begin} {high:g}{note}")


def _integer(param: str, value: int, low: int, high: int, *, note: str = "") -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    raise _error(param, value, f"an integer from {low} to {high}{note}")


def _token_id(param: str, value: int, vocab_size: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size:
        return
    accepted = f"ids from 0 to {vocab_size - 1}"
    raise ParamError(param, f"{param} holds token id {_show(value)}, expected {accepted}")


def _sized(param: str, values: Iterable[object], most: int, what: str) -> None:
    if not isinstance(values, tuple):
        raise _error(param, values, f"at most {most} {what}")
    if len(values) > most:
        raise ParamError(
            param, f"{param} has {len(values)} entries, expected at most {most} {what}"
        )


def _strings(param: str, values: tuple[str, ...], most: int, chars: int) -> None:
    what = f"non-empty strings of at most {chars} characters"
    _sized(param, values, most, what)
    for text in values:
        if not isinstance(text, str) or not 0 < len(text) <= chars or not is_unicode(text):
            raise ParamError(param, f"{param} holds {_show(text)}, expected at most {most} {what}")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8 (it holds no lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
