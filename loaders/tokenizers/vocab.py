"""The vocabulary tables of a GGUF file, checked and with special tokens worked out.

Key names and defaults: GGUF specification (docs/gguf.md of ggml-org/ggml) and llama.cpp, whose
treatment of special tokens is followed so that ids and stop tokens are the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.loaders.errors import ModelLoadError

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Names of tokens that end a generation although files often say so nowhere.
_END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
)
# Fill-in-the-middle tokens by role: metadata keys, then names. The last three end a generation.
_FIM_ROLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("fim_pre_token_id", "prefix_token_id"),
        (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>"),
            *("<PRE>", "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
        ),
    ),
    (
        ("fim_suf_token_id", "suffix_token_id"),
        (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>"),
            *("<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
        ),
    ),
    (
        ("fim_mid_token_id", "middle_token_id"),
        (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>"),
            *("<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>"),
        ),
    ),
    (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    (
        ("fim_rep_token_id",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ),
    (("fim_sep_token_id",), ("<|file_sep|>",)),
)
_FIM_ENDING = 3  # from this role on
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss


class Fields:
    """Typed, checked reads of ``tokenizer.ggml.*`` keys (or of another ``prefix``)."""

    def __init__(
        self, metadata: Mapping[str, Any], path: str | Path, prefix: str = "tokenizer.ggml."
    ) -> None:
        self.metadata = metadata
        self._path = path
        self._prefix = prefix

    def error(self, key: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path}: {self._prefix}{key}: {problem}")

    def get(self, key: str) -> Any:
        return self.metadata.get(self._prefix + key)

    def string(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"expected a string, found {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r}")
        return value

    def token(self, key: str, count: int) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"expected a token id, found {value!r}")
        if not 0 <= value < count:
            raise self.error(key, f"token id {value} outside the vocabulary of {count} tokens")
        return value

    def array(self, key: str, kind: type | tuple[type, ...], what: str) -> list[Any] | None:
        value = self.get(key)
        if value is None:
            return None
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, Sequence) or isinstance(items, str | bytes):
            raise self.error(key, f"expected an array of {what}, found {type(value).__name__}")
        for found in set(map(type, items)):
            if not issubclass(found, kind) or found is bool:
                raise self.error(key, f"expected an array of {what}, found {found.__name__} in it")
        return list(items)

    def numbers(self, key: str, kind: type | tuple[type, ...], count: int) -> list[Any] | None:
        items = self.array(key, kind, "numbers")
        if items is not None and len(items) != count:
            raise self.error(key, f"{len(items)} entries for {count} tokens")
        return items

    def required(self, key: str, value: list[Any] | None) -> list[Any]:
        if not value:
            raise self.error(key, "missing, and this tokenizer cannot do without")
        return value


@dataclass(frozen=True)
class Vocab:
    """A checked vocabulary.

    The id sets by what a token is: ``hidden`` (control, unknown: parsed only on request, no text
    when specials are skipped), ``user_defined`` (always parsed, shown as spelled), ``byte`` (one
    raw byte, spelled ``<0xXX>``), ``mute`` (unused, undefined: never any text). All other tokens
    are normal text.
    """

    tokens: tuple[str, ...]
    ids: Mapping[str, int]
    scores: tuple[float, ...] | None
    hidden: frozenset[int]
    user_defined: frozenset[int]
    byte: frozenset[int]
    mute: frozenset[int]
    strip_left: frozenset[int]  # white space before such a token is swallowed
    strip_right: frozenset[int]  # the same, after it
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]

    def byte_of(self, token_id: int) -> int:
        """The byte that a byte token spells."""
        return int(self.tokens[token_id][3:5], 16)


def end_of_generation(named: Mapping[str, int], declared: Iterable[int | None]) -> frozenset[int]:
    """Every id that ends a generation: ``declared`` ones and those known by name in ``named``.

    Two exceptions for tokens that are ordinary in some models: ``<|end|>`` where a harmony style
    vocabulary has its own end tokens, ``</s>`` in Gemma 4's.
    """
    ends = {i for i in declared if i is not None}
    ends |= {named[name] for name in _END_NAMES if name in named}

    def ending(name: str) -> bool:
        return named.get(name) in ends

    call = ending("<|call|>") or ending("<|calls|>")
    if "<|end|>" in named and call and (ending("<|return|>") or ending("<|flush|>")):
        ends.discard(named["<|end|>"])
    if "</s>" in named and (ending("<|tool_response>") or ending("<|plamo:eos|>")):
        ends.discard(named["</s>"])
    return frozenset(ends)


def read_vocab(fields: Fields, *, spm: bool) -> Vocab:
    """Read and check the tables; ``spm`` requires scores and has default BOS/EOS/unknown ids.

    Raises ModelLoadError (missing or empty tables, wrong types, different lengths, duplicate
    tokens, ids out of range, scores that are not numbers).
    """
    raw = fields.required("tokens", fields.array("tokens", str, "strings"))
    # llama.cpp renames empty entries, of which some files have several.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(raw)]
    count = len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != count:
        twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise fields.error("tokens", f"tokens {twice} and {ids[tokens[twice]]} are the same text")
    scores = fields.numbers("scores", (float, int), count)
    if spm:
        scores = fields.required("scores", scores)
        bad = next((i for i, score in enumerate(scores) if math.isnan(score)), None)
        if bad is not None:
            raise fields.error("scores", f"the score of token {bad} is not a number")
    types = fields.numbers("token_type", int, count) or [_NORMAL] * count

    special = {
        key: fields.token(f"{key}_token_id", count)
        for key in ("bos", "eos", "eot", "eom", "unknown")
    }
    if spm:
        for key, default in (("bos", 1), ("eos", 2), ("unknown", 0)):
            if special[key] is None and default < count:
                special[key] = default
    kinds = _Kinds(fields, tokens, ids, types)
    fim = kinds.fim_roles()
    declared = (special["eos"], special["eot"], special["eom"], *fim[_FIM_ENDING:])
    ends = end_of_generation(ids, declared)
    kinds.apply(ends)
    strip_left, strip_right = _stripping(fields, ids, kinds)
    return Vocab(
        tokens=tuple(tokens),
        ids=ids,
        scores=None if scores is None else tuple(map(float, scores)),
        hidden=frozenset(kinds.hidden),
        user_defined=frozenset(kinds.user_defined),
        byte=frozenset(kinds.byte),
        mute=frozenset(kinds.mute),
        strip_left=strip_left,
        strip_right=strip_right,
        bos_id=special["bos"],
        eos_id=special["eos"],
        unk_id=special["unknown"],
        end_ids=ends,
    )


class _Kinds:
    """Sorts ids by token type, then overrides the types that files are known to get wrong."""

    def __init__(
        self, fields: Fields, tokens: list[str], ids: Mapping[str, int], types: list[int]
    ) -> None:
        self.fields, self.ids, self.count = fields, ids, len(tokens)
        odd = [(i, kind) for i, kind in enumerate(types) if kind != _NORMAL]
        self.hidden = {i for i, kind in odd if kind in (_CONTROL, _UNKNOWN)}
        self.user_defined = {i for i, kind in odd if kind == _USER_DEFINED}
        self.byte = {i for i, kind in odd if kind == _BYTE}
        self.mute = {i for i, _ in odd} - self.hidden - self.user_defined - self.byte
        for i in self.byte:
            text = tokens[i]
            if len(text) != 6 or text[:3] != "<0x" or not _is_hex(text[3:5]) or text[5] != ">":
                raise fields.error("token_type", f"token {i} {text!r} is no byte token like <0x0A>")

    def fim_roles(self) -> list[int | None]:
        """The id of every fill-in-the-middle role; those found by name become control tokens."""
        found: list[int | None] = []
        for keys, names in _FIM_ROLES:
            declared = [self.fields.token(key, self.count) for key in keys]
            role = next((i for i in reversed(declared) if i is not None), None)
            if role is None:
                role = next((self.ids[name] for name in names if name in self.ids), None)
                if role is not None:
                    self.hidden.add(role)
            found.append(role)
        return found

    def apply(self, ends: frozenset[int]) -> None:
        """End tokens known by name are control tokens; a few names are always shown."""
        for name in _END_NAMES:
            if self.ids.get(name) in ends:
                self.hidden.add(self.ids[name])
        shown = {self.ids[name] for name in _ALWAYS_SHOWN if name in self.ids}
        for name in ("<|end|>", "</s>"):  # met, but found not to end a generation here
            if name in self.ids and self.ids[name] not in ends:
                self._reset(self.ids[name])
                if name == "<|end|>":
                    shown.add(self.ids[name])
        for i in shown:
            self._reset(i)
            self.user_defined.add(i)

    def _reset(self, token_id: int) -> None:
        for group in (self.hidden, self.user_defined, self.byte, self.mute):
            group.discard(token_id)


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdefABCDEF" for c in text)


def _stripping(
    fields: Fields, ids: Mapping[str, int], kinds: _Kinds
) -> tuple[frozenset[int], frozenset[int]]:
    """The tokens that swallow white space on their left, and on their right.

    GGUF does not record this property of added tokens; llama.cpp knows it by model name.
    """
    pre = fields.string("pre") or ""
    name = str(fields.metadata.get("general.name", "")).lower()
    left: set[int] = set()
    right: set[int] = set()
    if any(jina in pre for jina in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        left |= {ids[mask] for mask in ("<mask>",) if mask in ids}
    elif "phi-3" in name or "phi3" in name:
        right = kinds.hidden | kinds.user_defined | {ids[s] for s in ("</s>",) if s in ids}
        right -= {ids[s] for s in ("<unk>", "<s>", "<|endoftext|>") if s in ids}
    elif "modern-bert" in name:
        left |= {ids[mask] for mask in ("[MASK]",) if mask in ids}
    return frozenset(left), frozenset(right)
