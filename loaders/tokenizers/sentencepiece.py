"""Tokenizers from SentencePiece's ``tokenizer.model``, a serialized ``ModelProto``.

Field numbers: ``sentencepiece_model.proto`` of google/sentencepiece. Protocol buffers wire format:
https://protobuf.dev/programming-guides/encoding. Only BPE models without text normalization are
read: what Llama, Mistral and Gemma ship.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall.loaders.errors import ModelLoadError
from squall.loaders.tokenizers.spm import SpmTokenizer
from squall.loaders.tokenizers.vocab import Fields, read_vocab

_CONTROL, _USER_DEFINED = 3, 4  # piece types; the numbers are those of GGUF's token types
_BPE = 2  # TrainerSpec.model_type
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass
class _Model:
    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    trainer: dict[int, Any] = field(default_factory=dict)
    normalizer: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AddedToken:
    """One entry of ``added_tokens_decoder``."""

    text: str
    special: bool


def sentencepiece_tokenizer(
    path: Path, added: Mapping[int, AddedToken], names: Mapping[str, str], flags: Mapping[str, bool]
) -> SpmTokenizer:
    """Read ``path`` and append ``added`` tokens by id.

    ``names``: spellings of ``bos``/``eos``/``unknown``, otherwise the file's; ``flags``:
    ``add_bos_token`` (default true), ``add_eos_token`` (default false). ModelLoadError for a
    damaged file or a kind of model that is not supported.
    """
    try:
        model = _parse(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise ModelLoadError(f"{path}: not a SentencePiece model: {error}") from None
    _check(path, model)
    # User-defined pieces are looked for in the text as written, with real spaces.
    for i, kind in enumerate(model.types):
        if kind == _USER_DEFINED:
            model.tokens[i] = model.tokens[i].replace("\u2581", " ")
    for i in sorted(added):
        _add(path, model, i, added[i])
    ids: dict[str, Any] = {}
    for key, number, default in (("bos", 41, 1), ("eos", 42, 2), ("unknown", 40, 0)):
        declared = _signed(model.trainer.get(number, default))
        if key in names and names[key] in model.tokens:
            declared = model.tokens.index(names[key])
        if 0 <= declared < len(model.tokens):
            ids[f"{key}_token_id"] = declared
    fields = Fields(
        {"tokens": model.tokens, "scores": model.scores, "token_type": model.types, **ids}, path, ""
    )
    return SpmTokenizer(
        read_vocab(fields, spm=True),
        add_bos=flags.get("add_bos_token", True),
        add_eos=flags.get("add_eos_token", False),
        space_prefix=bool(model.normalizer.get(3, 1)),
    )


def _check(path: Path, model: _Model) -> None:
    kind = model.trainer.get(3, 1)
    if kind != _BPE:
        name = _MODEL_TYPES.get(kind, str(kind))
        raise ModelLoadError(
            f"{path}: SentencePiece model type {name!r} is not supported (supported: 'bpe'; "
            "any type with a tokenizer.json beside it)"
        )
    if model.normalizer.get(2) or model.normalizer.get(4, 1):
        raise ModelLoadError(
            f"{path}: SentencePiece models that normalize text (character map or removal of extra "
            "white space) are not supported without a tokenizer.json"
        )


def _add(path: Path, model: _Model, token_id: int, token: AddedToken) -> None:
    kind = _CONTROL if token.special else _USER_DEFINED
    if token_id < len(model.tokens):
        if model.tokens[token_id] != token.text:
            raise ModelLoadError(
                f"{path}: added token {token_id} {token.text!r} is {model.tokens[token_id]!r} here"
            )
        model.types[token_id] = kind
    elif token_id == len(model.tokens):
        model.tokens.append(token.text)
        model.scores.append(0.0)
        model.types.append(kind)
    else:
        raise ModelLoadError(
            f"{path}: added token {token_id} {token.text!r} leaves a gap after "
            f"{len(model.tokens)} tokens"
        )


class _Damaged(Exception):
    """The bytes are not a well-formed message."""


def _parse(data: bytes) -> _Model:
    model = _Model()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_message(value)))
            try:
                model.tokens.append(_message(piece.get(1, b"")).decode())
            except UnicodeDecodeError:
                raise _Damaged(f"piece {len(model.tokens)} is not UTF-8") from None
            score = piece.get(2, b"\0\0\0\0")
            if not isinstance(score, bytes) or len(score) != 4:
                raise _Damaged(f"piece {len(model.types)} has no valid score")
            model.scores.append(struct.unpack("<f", score)[0])
            model.types.append(_integer(piece.get(3, 1)))
        elif number == 2:
            model.trainer = dict(_fields(_message(value)))
        elif number == 3:
            model.normalizer = dict(_fields(_message(value)))
    if not model.tokens:
        raise _Damaged("it holds no pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: integers, or the raw bytes of all other types."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Damaged(f"unknown wire type {wire}")
        if size > end - at:
            raise _Damaged("a field reaches past the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Damaged("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Damaged("a number is too long")


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a number where a message belongs")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Damaged("bytes where a number belongs")
    return value


def _signed(value: int | bytes) -> int:
    """int32 fields hold negative numbers as 64-bit two's complement."""
    number = value if isinstance(value, int) else -1
    return number - (1 << 64) if number >= 1 << 63 else number
