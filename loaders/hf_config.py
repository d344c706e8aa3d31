"""Typed, checked reads of the JSON files in a Hugging Face model folder.

``ConfigReader`` replaces ``dict.get``: every read names the type it wants, and what does not fit
becomes one ``ModelLoadError`` line with the key, the file, what was found and what is accepted.
A JSON ``null`` counts as absent, as transformers treats it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from squall.loaders.errors import ModelLoadError

JSON_LIMIT: Final = 16 << 20
"""Largest accepted config file in bytes; real ones hold a few KB."""

_SIZE_KEYS: Final = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "original_max_position_embeddings",
    }
)
_DTYPES: Final = ("float32", "float16", "bfloat16")
_INT_LIMIT: Final = 2**63 - 1

T = TypeVar("T")


class _Missing:
    """Type of ``MISSING``."""


MISSING: Final[Any] = _Missing()
"""The default of a key that must be present (typed Any: a read then returns the bare type)."""


def shorten(value: object, limit: int = 60) -> str:
    """``repr(value)`` on one line, cut to ``limit`` characters, for error messages."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json(path: Path, *, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises ``ModelLoadError`` when the file is missing, unreadable, larger than ``limit`` bytes,
    not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > limit:
        raise ModelLoadError(f"{path}: larger than the {limit >> 20} MiB accepted for this file")
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ModelLoadError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise ModelLoadError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {shorten(data)}")
    return data


class ConfigReader:
    """Typed reads over a JSON object; ``file`` is the one named in errors.

    Each ``get_*`` returns ``default`` when the key (and every alias) is absent or null, and
    raises ``ModelLoadError`` when there is no default or the value does not fit.
    """

    def __init__(self, data: Mapping[str, Any], file: str | Path, prefix: str = "") -> None:
        self.data = data
        self.file = str(file)
        self.prefix = prefix
        self._read: set[str] = set()

    @classmethod
    def from_file(cls, path: Path) -> "ConfigReader":
        return cls(read_json(path), path)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.data.get(key) is not None

    def is_list(self, key: str) -> bool:
        """Whether the value is one for each layer, for example."""
        return isinstance(self.data.get(key), list)

    def unread(self) -> list[str]:
        """Keys nobody asked for so far, in file order."""
        return [key for key in self.data if key not in self._read]

    def fail(self, key: str, problem: str) -> ModelLoadError:
        """The error for a value of ``key`` that cannot be used."""
        return ModelLoadError(f"{self.file}: {self.prefix}{key}: {problem}")

    def _find(self, key: str, default: object, aliases: Sequence[str]) -> tuple[str, Any]:
        for name in (key, *aliases):
            self._read.add(name)
            if self.data.get(name) is not None:
                return name, self.data[name]
        if default is MISSING:
            also = f" (or {', '.join(aliases)})" if aliases else ""
            raise self.fail(key, f"missing, and needed{also}")
        return key, None

    def get_int(
        self,
        key: str,
        default: T = MISSING,
        *,
        minimum: int | None = None,
        maximum: int = _INT_LIMIT,
        aliases: Sequence[str] = (),
    ) -> int | T:
        """An integer in ``[minimum, maximum]``; well-known sizes must be >= 1 unless said.

        Floats with an integral value (``2048.0``) are taken, as some exporters write them.
        """
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        if minimum is None:
            minimum = 1 if key in _SIZE_KEYS else -_INT_LIMIT
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"expected an integer, found {shorten(value)}")
        if not minimum <= value <= maximum:
            raise self.fail(
                name, f"expected {_range_text(minimum, maximum)}, found {shorten(value)}"
            )
        return value

    def get_float(
        self,
        key: str,
        default: T = MISSING,
        *,
        above: float = -math.inf,
        maximum: float = math.inf,
        aliases: Sequence[str] = (),
    ) -> float | T:
        """A finite number with ``above < value <= maximum``; integers are converted."""
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, f"expected a number, found {shorten(value)}")
        if abs(value) > 1e300 or not math.isfinite(value):
            raise self.fail(name, f"expected a finite number, found {shorten(value)}")
        if not above < value <= maximum:
            bounds = [f"> {above:g}"] if math.isfinite(above) else []
            bounds += [f"<= {maximum:g}"] if math.isfinite(maximum) else []
            raise self.fail(
                name, f"expected a number {' and '.join(bounds)}, found {shorten(value)}"
            )
        return float(value)

    def get_bool(self, key: str, default: T = MISSING, *, aliases: Sequence[str] = ()) -> bool | T:
        """``true`` or ``false``; no other value is converted."""
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, f"expected true or false, found {shorten(value)}")
        return value

    def get_str(
        self,
        key: str,
        default: T = MISSING,
        *,
        choices: Iterable[str] = (),
        aliases: Sequence[str] = (),
    ) -> str | T:
        """A string, one of ``choices`` when given."""
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        accepted = tuple(choices)
        if not isinstance(value, str):
            raise self.fail(name, f"expected a string, found {shorten(value)}")
        if accepted and value not in accepted:
            raise self.fail(name, f"found {shorten(value)}, accepted: {', '.join(accepted)}")
        return value

    def get_list(
        self,
        key: str,
        default: T = MISSING,
        *,
        item: type[object] = object,
        length: int | None = None,
        aliases: Sequence[str] = (),
    ) -> list[Any] | T:
        """A list; every entry of type ``item`` (``float`` also takes integers)."""
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        if not isinstance(value, list):
            raise self.fail(name, f"expected a list, found {shorten(value)}")
        if length is not None and len(value) != length:
            raise self.fail(name, f"expected {length} entries, found {len(value)}")
        accepted: tuple[type[object], ...] = (int, float) if item is float else (item,)
        for index, entry in enumerate(value):
            wrong_bool = isinstance(entry, bool) and item in (int, float)
            if wrong_bool or not isinstance(entry, accepted):
                raise self.fail(
                    f"{name}[{index}]", f"expected {item.__name__}, found {shorten(entry)}"
                )
        return value

    def get_each(self, key: str, count: int) -> list[int]:
        """``count`` integers; a single one is taken for all."""
        if isinstance(self.data.get(key), list):
            return self.get_list(key, item=int, length=count)
        return [self.get_int(key)] * count

    def get_dict(
        self, key: str, default: T = MISSING, *, aliases: Sequence[str] = ()
    ) -> dict[str, Any] | T:
        """A JSON object."""
        name, value = self._find(key, default, aliases)
        if value is None:
            return default
        if not isinstance(value, dict):
            raise self.fail(name, f"expected an object, found {shorten(value)}")
        return value

    def rope(self, layer_type: str | None = None) -> dict[str, Any]:
        """``rope_parameters`` of this config."""
        return rope_parameters(self, layer_type)

    def sub(self, key: str) -> "ConfigReader":
        """A reader over a nested object, such as ``text_config``; it must be there."""
        data = self.get_dict(key)
        data = {**_MODEL_DEFAULTS.get(data.get("model_type", ""), {}), **data}
        return ConfigReader(data, self.file, f"{self.prefix}{key}.")


def _range_text(minimum: int, maximum: int) -> str:
    if maximum == _INT_LIMIT:
        return "a 64-bit integer" if minimum == -_INT_LIMIT else f"an integer >= {minimum}"
    return f"an integer from {minimum} to {maximum}"


def find_architecture(config: ConfigReader) -> str:
    """The single entry of ``architectures``, the class name that picks the model code."""
    names = config.get_list("architectures", item=str)
    if len(names) != 1:
        found = ", ".join(shorten(name) for name in names[:4]) or "none"
        raise config.fail("architectures", f"expected exactly one entry, found {found}")
    return str(names[0])


def checkpoint_dtype(config: ConfigReader) -> str | None:
    """The dtype the checkpoint was saved in, ``"float32"``, ``"float16"`` or ``"bfloat16"``:
    ``dtype`` (transformers 5) or ``torch_dtype`` (4), at the top or in ``text_config``; None when
    not stated."""
    readers = [config, config.sub("text_config")] if config.has("text_config") else [config]
    for reader in readers:
        name = reader.get_str("dtype", None, aliases=("torch_dtype",))
        if name is None:
            continue
        if name.removeprefix("torch.") not in _DTYPES:
            raise reader.fail("dtype", f"found {shorten(name)}, accepted: {', '.join(_DTYPES)}")
        return name.removeprefix("torch.")
    return None


def eos_ids(folder: Path) -> set[int]:
    """Union of ``eos_token_id`` (an id or a list) over config.json, its text_config and
    generation_config.json; a file that is absent adds nothing."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if not (folder / file).exists():
            continue
        reader = ConfigReader.from_file(folder / file)
        readers = [reader, reader.sub("text_config")] if reader.has("text_config") else [reader]
        for part in readers:
            value = part.data.get("eos_token_id")
            for entry in value if isinstance(value, list) else [value]:
                if entry is None:
                    continue
                if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
                    raise part.fail(
                        "eos_token_id", f"expected token ids >= 0, found {shorten(entry)}"
                    )
                ids.add(entry)
    return ids


_ROPE_NAMES: Final = {"mrope": "default", "su": "longrope"}  # older spellings
_ROPE_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_DEFAULT_THETA: Final = 10000.0
# rope_theta of global and of sliding layers where config.json leaves them out: transformers 4
# does not write values that equal the class's defaults, and Gemma 3's published files rely on it.
_MODEL_THETA: Final = {
    "gemma3_text": (1e6, 1e4),
    "gemma3n_text": (1e6, 1e4),
    "llama4_text": (5e5, None),
    "olmo3": (5e5, 5e5),
}
# Likewise of other keys, in nested objects only: for a config of its own transformers 4 writes all.
_MODEL_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
}


def rope_parameters(reader: ConfigReader, layer_type: str | None = None) -> dict[str, Any]:
    """Rope settings of one layer type as ``{"rope_type": str, "rope_theta": float, ...}``.

    Reads transformers 4 (``rope_theta``, ``rope_scaling`` with ``type`` or ``rope_type``, Gemma 3's
    ``rope_local_base_freq`` for ``"sliding_attention"``) and transformers 5 (``rope_parameters``,
    flat or one object per layer type). Where both are given ``rope_scaling`` wins, as in
    transformers' ``RotaryEmbeddingConfigMixin``, whose rules this follows. Rules that extend a
    context get ``original_max_position_embeddings``; the other keys are passed on as found, with
    numbers checked. Raises ``ModelLoadError`` naming the key.
    """
    theta, local_theta = _MODEL_THETA.get(reader.data.get("model_type", ""), (_DEFAULT_THETA, None))
    local_theta = reader.get_float("rope_local_base_freq", local_theta, above=0)
    theta = reader.get_float("rope_theta", theta, above=0)
    flat = reader.get_dict("rope_parameters", {})
    nested = {kind: value for kind, value in flat.items() if isinstance(value, dict)}
    scaling = reader.get_dict("rope_scaling", {})
    key = "rope_scaling" if scaling else "rope_parameters"
    sliding = layer_type == "sliding_attention" and (bool(nested) or local_theta is not None)
    if sliding:
        key = "rope_parameters.sliding_attention"
        scaling = dict(nested.get("sliding_attention", {}))
        theta = theta if local_theta is None else local_theta
    elif nested:
        kind = layer_type or "full_attention"
        if kind not in nested:
            raise reader.fail("rope_parameters", f"no {kind} among {', '.join(nested)}")
        scaling = {**nested[kind], **scaling}
        key = f"rope_parameters.{kind}"
    settings = dict(scaling if scaling or nested or sliding else flat)
    settings.setdefault("rope_theta", theta)
    if reader.has("partial_rotary_factor"):
        settings.setdefault("partial_rotary_factor", reader.get_float("partial_rotary_factor"))
    return _checked_rope(reader, key, settings)


def _checked_rope(reader: ConfigReader, key: str, settings: dict[str, Any]) -> dict[str, Any]:
    part = ConfigReader(settings, reader.file, f"{reader.prefix}{key}.")
    kind = part.get_str("rope_type", "default", aliases=("type",))
    kind = _ROPE_NAMES.get(kind, kind)
    for name in _ROPE_NEEDS.get(kind, ()):
        if not part.has(name):
            raise part.fail(name, f"missing, and needed by rope type {kind}")
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            part.get_float(name)
    for name in ("rope_theta", "factor", "partial_rotary_factor", "attention_factor"):
        part.get_float(name, None, above=0)
    result = {name: value for name, value in settings.items() if name != "type"}
    if kind in ("llama3", "yarn", "longrope"):
        # Phi-3 states it beside the rope settings, and there it has precedence.
        original = reader.get_int("original_max_position_embeddings", None)
        own = part.get_int("original_max_position_embeddings", None)
        result["original_max_position_embeddings"] = (
            original or own or reader.get_int("max_position_embeddings")
        )
    return {**result, "rope_type": kind, "rope_theta": part.get_float("rope_theta")}
