"""Checked reads from the metadata of a GGUF file."""

import math
from typing import Any

from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile

_SIZE_LIMIT = 2**31 - 1


class Source:
    """Reads the keys of one architecture: ``size("block_count")`` is ``llama.block_count``."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def key(self, suffix: str) -> str:
        return f"{self.architecture}.{suffix}"

    def fail(self, suffix: str, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.file.path}: metadata key {self.key(suffix)!r}: {message}")

    def has(self, suffix: str) -> bool:
        return self.key(suffix) in self.file.metadata

    def has_head_norms(self) -> bool:
        """Whether the heads of q and k are normed."""
        return "blk.0.attn_q_norm.weight" in self.file.tensors

    def size(self, suffix: str, default: int | None = None, minimum: int = 1) -> int:
        """A count; one for each layer is taken when all layers agree."""
        key = self.key(suffix)
        if not self.has(suffix) and default is not None:
            return default
        value: Any
        if isinstance(self.file.metadata.get(key), int | None):
            value = self.file.get_int(key)
        else:
            values = self.file.get_list(key)
            if len(set(map(str, values))) != 1 or type(values[0]) is not int:
                raise self.fail(
                    suffix, "is not one count: it differs from layer to layer or holds no counts"
                )
            value = values[0]
        if not minimum <= value <= _SIZE_LIMIT:
            raise self.fail(suffix, f"{value} is not in [{minimum}, {_SIZE_LIMIT}]")
        return int(value)

    def flag(self, suffix: str) -> bool:
        """False where the file has no such key."""
        value = self.file.metadata.get(self.key(suffix), False)
        if not isinstance(value, bool):
            raise self.fail(suffix, f"{value!r} is not true or false")
        return value

    def positive(self, suffix: str, default: float | None = None) -> float:
        """A finite number above zero."""
        key = self.key(suffix)
        value = self.file.get_float(key) if default is None else self.file.get_float(key, default)
        if not (math.isfinite(value) and value > 0):
            raise self.fail(suffix, f"{value} is not a number above 0")
        return value
