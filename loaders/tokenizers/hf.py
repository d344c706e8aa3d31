"""Tokenizers of Hugging Face model folders: ``tokenizer.json``, or else ``tokenizer.model``."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from squall.loaders.errors import ModelLoadError
from squall.loaders.tokenizer import TextStream, Tokenizer
from squall.loaders.tokenizers.decoders import TableDecoder, WindowDecoder, table_rules
from squall.loaders.tokenizers.detokenize import well_formed
from squall.loaders.tokenizers.sentencepiece import AddedToken, sentencepiece_tokenizer
from squall.loaders.tokenizers.vocab import end_of_generation


def hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, with what ``tokenizer_config.json`` adds to it.

    Raises ModelLoadError naming the file (missing, damaged, unsupported).
    """
    config = _TokenizerConfig(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return HfTokenizer(path, config)
    model = folder / "tokenizer.model"
    if model.is_file():
        return sentencepiece_tokenizer(model, config.added, config.names, config.flags)
    raise ModelLoadError(
        f"{folder}: tokenizer missing: neither tokenizer.json nor tokenizer.model is there"
    )


class _TokenizerConfig:
    """What counts of ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``.

    ``names``: spelling of ``bos``, ``eos``, ``unknown``; ``flags``: ``add_bos_token`` and
    ``add_eos_token`` where set; ``added``: tokens by id.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer_config.json"
        config = _json_object(self.path)
        fallback = _json_object(folder / "special_tokens_map.json")
        self.names: dict[str, str] = {}
        for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token")):
            text = self._text(name, config.get(name, fallback.get(name)))
            if text is not None:
                self.names[key] = text
        self.flags: dict[str, bool] = {}
        for name in ("add_bos_token", "add_eos_token"):
            value = config.get(name)
            if value is not None and not isinstance(value, bool):
                raise self._error(name, f"expected true or false, found {value!r}")
            if value is not None:
                self.flags[name] = value
        self.added = self._added(config.get("added_tokens_decoder"))
        for text, token_id in _json_object(folder / "added_tokens.json").items():
            if isinstance(token_id, int) and token_id >= 0:
                self.added.setdefault(token_id, AddedToken(text, special=False))

    def _error(self, key: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {key}: {problem}")

    def _text(self, key: str, value: Any) -> str | None:
        """A token is a string or an object whose ``content`` is one."""
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise self._error(key, f"expected a token, found {type(value).__name__}")
        return value

    def _added(self, decoder: Any) -> dict[int, AddedToken]:
        key = "added_tokens_decoder"
        if decoder is None:
            return {}
        if not isinstance(decoder, dict):
            raise self._error(key, f"expected an object, found {type(decoder).__name__}")
        added: dict[int, AddedToken] = {}
        for token_id, entry in decoder.items():
            text = self._text(key, entry)
            if not token_id.isdecimal() or not text:
                raise self._error(key, f"entry {token_id!r} is not a token by id")
            special = entry.get("special") if isinstance(entry, dict) else False
            added[int(token_id)] = AddedToken(text, special is True)
        return added


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class HfTokenizer:
    """A ``tokenizer.json`` run by the ``tokenizers`` library. Implements ``Tokenizer``."""

    def __init__(self, path: Path, config: _TokenizerConfig) -> None:
        self._path, self._added = path, config.added
        self._tokenizer = self._load()
        tokens = self._tokenizer.get_added_tokens_decoder()
        special = {i: token.content for i, token in tokens.items() if token.special}
        self.special_ids = frozenset(special)
        self.vocab_size = max(self._tokenizer.get_vocab_size(), *(i + 1 for i in tokens), 0)
        self.bos_id = self._named(config.names, "bos")
        self.eos_id = self._named(config.names, "eos")
        self.unk_id = self._named(config.names, "unknown")
        named = {text: i for i, text in special.items()}
        self.eos_ids = end_of_generation(named, [self.eos_id])
        self._before, self._after = self._surroundings(config)
        rules = table_rules(self._tokenizer)
        if rules is None:
            self._decoder: TableDecoder | WindowDecoder = WindowDecoder(self._tokenizer)
        else:
            self._decoder = TableDecoder(self._tokenizer, rules, frozenset(tokens), special)

    def _load(self) -> Any:
        try:
            loaded = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises bare Exceptions
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelLoadError(f"{self._path}: not a usable tokenizer: {line}") from None
        loaded.no_truncation()
        loaded.no_padding()
        for token_id in sorted(self._added):
            token = self._added[token_id]
            if loaded.token_to_id(token.text) is None:
                entry = tokenizers.AddedToken(
                    token.text, special=token.special, normalized=not token.special
                )
                loaded.add_tokens([entry])
            found = loaded.token_to_id(token.text)
            if found != token_id:
                raise ModelLoadError(
                    f"{self._path}: added token {token.text!r} has the id {found}, but "
                    f"{token_id} in tokenizer_config.json"
                )
        return loaded

    @cached_property
    def _plain(self) -> Any:
        """A second copy that takes the spelling of special tokens for ordinary text."""
        loaded = self._load()
        loaded.encode_special_tokens = True
        return loaded

    def _named(self, names: Mapping[str, str], key: str) -> int | None:
        name = names.get(key)
        found: int | None = None if name is None else self._tokenizer.token_to_id(name)
        return found

    def _surroundings(self, config: _TokenizerConfig) -> tuple[list[int], list[int]]:
        """The ids to put before and after a text: the file's own, unless the config decides."""
        sample = self._tokenizer.encode("a", add_special_tokens=True)
        mask: list[int] = sample.special_tokens_mask
        head = next((i for i, added in enumerate(mask) if not added), len(mask))
        tail = next((i for i, added in enumerate(reversed(mask)) if not added), 0)
        before, after = sample.ids[:head], sample.ids[len(mask) - tail :]
        if "add_bos_token" in config.flags:
            before = self._wanted(config, "bos", self.bos_id)
        if "add_eos_token" in config.flags:
            after = self._wanted(config, "eos", self.eos_id)
        return before, after

    @staticmethod
    def _wanted(config: _TokenizerConfig, kind: str, token_id: int | None) -> list[int]:
        if not config.flags[f"add_{kind}_token"]:
            return []
        if token_id is None:
            raise ModelLoadError(
                f"{config.path}: add_{kind}_token is true, but {kind}_token names no known token"
            )
        return [token_id]

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """See ``Tokenizer``. Lone surrogates, which no UTF-8 text has, become U+FFFD."""
        tokenizer = self._tokenizer if parse_special else self._plain
        ids: list[int] = tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        return [*self._before, *ids, *self._after] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See ``Tokenizer``. Ids outside the vocabulary have no text."""
        return self._decoder.decode(ids, skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        return self._decoder.stream(skip_special)

    def token_text(self, token_id: int) -> str:
        return self._decoder.piece(token_id, skip_special=False).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._decoder.piece(token_id, skip_special=True)

    def token_id(self, text: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(text)
        return found
