"""GGUF model files (versions 1-3, little endian), opened by memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in a file is believed
before it has been checked against the file's size, so a damaged or hostile file ends in one
``ModelLoadError``; what opening allocates is limited to twice the file's size plus 64 MiB.
A file that another program shortens while it is open ends the process (SIGBUS), as with any
memory map.
"""

import ctypes
import mmap
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, gguf_formats
from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf_header import Header, TensorInfo, read_header

T = TypeVar("T")


class _Missing:
    """The type of ``MISSING``."""


MISSING: Final = _Missing()  # default of the typed reads: the key must be there

_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_SHARDS = 65535  # split.count is a uint16


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. ``shape`` is in PyTorch's order: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int
    offset: int  # bytes from the start of its shard
    shard: int  # index into the file's shards

    @property
    def format(self) -> QuantFormat:
        return gguf_formats()[self.ggml_type]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


class _Mapping:
    """A file's bytes, read only, as a torch tensor that keeps the memory map alive."""

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelLoadError(f"{path}: is not a regular file")
            if status.st_size < 4:
                raise ModelLoadError(
                    f"{path}: is not a GGUF file: it holds {status.st_size} bytes, no header"
                )
            self.map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def tensor(self) -> Tensor:
        """uint8 ``[file size]``, zero-copy; writing to it is a segmentation fault.

        torch warns about read-only buffers, hence the detour over an address: the tensor holds the
        ctypes array, and that the map. A private writable map would do without, but Linux refuses
        one that is larger than memory.
        """
        size = len(self.map)
        address = np.frombuffer(self.map, dtype=np.uint8).ctypes.data
        array = (ctypes.c_uint8 * size).from_address(address)
        array.owner = self.map  # type: ignore[attr-defined]
        return torch.frombuffer(array, dtype=torch.uint8)

    def drop(self, start: int, length: int) -> None:
        """Tell the system that whole pages within the range will not be read soon."""
        if hasattr(self.map, "madvise"):
            begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class GGUFFile:
    """One GGUF model: a file, or all the files of a split one.

    ``metadata`` maps keys to int, float, bool, str, numpy arrays (numbers and booleans) or lists
    (strings, arrays). Bytes of tensors are only read when they are used.
    """

    def __init__(self, path: Path, headers: list[Header], mappings: list[_Mapping]) -> None:
        """Use ``GGUFFile.open``."""
        self.path = path
        self.version = headers[0].version
        self.metadata: Mapping[str, Any] = MappingProxyType(headers[0].metadata)
        self._mappings = mappings
        self._bytes = [mapping.tensor() for mapping in mappings]
        tensors: dict[str, GGUFTensor] = {}
        for shard, header in enumerate(headers):
            for info in header.tensors:
                if info.name in tensors:
                    raise ModelLoadError(
                        f"{header.path}: tensor {info.name!r} is in another shard too"
                    )
                tensors[info.name] = _located(info, header, shard)
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(tensors)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> "GGUFFile":
        """Open ``path``; any shard of a split file brings in the others.

        ModelLoadError: unreadable, damaged, incomplete, or a tensor type that is not supported.
        """
        first = Path(path)
        mapping = _Mapping(first)
        header = read_header(first, mapping.map)
        count = header.split("split.count")
        if count <= 1:
            return GGUFFile(first, [header], [mapping])
        paths = _shard_paths(header, count)
        opened = {first.name: (header, mapping)}
        headers, mappings = [], []
        for number, shard in enumerate(paths):
            header, mapping = opened.get(shard.name) or _open_shard(shard, first)
            _check_shard(header, number, count)
            headers.append(header)
            mappings.append(mapping)
        _check_complete(headers)
        return GGUFFile(paths[0], headers, mappings)

    def raw(self, name: str) -> Tensor:
        """The stored bytes, uint8 ``[rows, row_bytes]``, zero-copy and read only.

        Dimensions before the last are multiplied into ``rows``.
        """
        tensor = self._tensor(name)
        data = self._bytes[tensor.shard][tensor.offset : tensor.offset + tensor.nbytes]
        return data.view(tensor.rows, -1)

    def dense(self, name: str) -> Tensor:
        """An F32, F16 or BF16 tensor in its shape, zero-copy where its alignment permits."""
        tensor = self._tensor(name)
        dtype = tensor.format.dtype
        if dtype is None:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} is {tensor.format.name}; accepted: F32, F16, BF16"
            )
        data = self.raw(name)
        aligned = data.data_ptr() % dtype.itemsize == 0 == data.storage_offset() % dtype.itemsize
        return (data if aligned else data.clone()).view(dtype).view(tensor.shape)

    def release(self, name: str) -> None:
        """Let the pages of a tensor go once it has been copied; a later read brings them back."""
        tensor = self._tensor(name)
        self._mappings[tensor.shard].drop(tensor.offset, tensor.nbytes)

    def get_int(self, key: str, default: T | _Missing = MISSING) -> int | T:
        """The integer under ``key``, else ``default``. ModelLoadError: absent, another type."""
        return self._get(key, "an integer", _as_int, default)

    def get_float(self, key: str, default: T | _Missing = MISSING) -> float | T:
        """The number under ``key`` as a float; otherwise as ``get_int``."""
        return self._get(key, "a number", _as_float, default)

    def get_bool(self, key: str, default: T | _Missing = MISSING) -> bool | T:
        """The boolean under ``key``; otherwise as ``get_int``."""
        return self._get(key, "a boolean", lambda v: v if isinstance(v, bool) else None, default)

    def get_str(self, key: str, default: T | _Missing = MISSING) -> str | T:
        """The string under ``key``; otherwise as ``get_int``."""
        return self._get(key, "a string", lambda v: v if isinstance(v, str) else None, default)

    def get_list(self, key: str, default: T | _Missing = MISSING) -> list[Any] | T:
        """The array under ``key`` as a list of Python values; otherwise as ``get_int``."""
        return self._get(key, "an array", _as_list, default)

    def _get(
        self,
        key: str,
        expected: str,
        convert: Callable[[Any], T | None],
        default: Any,
    ) -> Any:
        if key not in self.metadata:
            if isinstance(default, _Missing):
                raise ModelLoadError(f"{self.path}: metadata key {key!r} is missing ({expected})")
            return default
        value = convert(self.metadata[key])
        if value is None:
            kind = type(self.metadata[key]).__name__
            raise ModelLoadError(f"{self.path}: metadata key {key!r} is {kind}, not {expected}")
        return value

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]


def _as_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_float(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else None


def _as_list(value: Any) -> list[Any] | None:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, list) else None


def _located(info: TensorInfo, header: Header, shard: int) -> GGUFTensor:
    offset = header.data_start + info.offset
    return GGUFTensor(info.name, info.shape, info.ggml_type, info.nbytes, offset, shard)


def _open_shard(path: Path, sibling: Path) -> tuple[Header, _Mapping]:
    if not path.exists():
        raise ModelLoadError(f"{path}: missing; {sibling.name} is one part of a split model")
    mapping = _Mapping(path)
    return read_header(path, mapping.map), mapping


def _shard_paths(header: Header, count: int) -> list[Path]:
    """The names of all shards, from the name of one."""
    match = _SHARD_NAME.fullmatch(header.path.name)
    if count > _MAX_SHARDS or match is None or int(match["count"]) != count:
        raise ModelLoadError(
            f"{header.path}: one part of a model split in {count}; its name must end in "
            f"-NNNNN-of-{count:05d}.gguf"
        )
    names = (f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
    return [header.path.with_name(name) for name in names]


def _check_shard(header: Header, number: int, count: int) -> None:
    found = (header.split("split.no"), header.split("split.count"))
    if found != (number, count):
        raise ModelLoadError(
            f"{header.path}: split.no and split.count are {found[0]} and {found[1]}; "
            f"its name says {number} and {count}"
        )


def _check_complete(headers: list[Header]) -> None:
    expected = headers[0].split("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if found != expected:
        raise ModelLoadError(
            f"{headers[0].path}: split.tensors.count is {expected}, its {len(headers)} shards "
            f"hold {found} tensors"
        )
