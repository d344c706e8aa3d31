"""The part of a GGUF file before the tensor data: header, metadata, tensor table.

Layout (little endian): "GGUF", version u32, tensor count, key count; per key: name, type u32,
value; per tensor: name, dimension count u32, dimensions (fastest first), type u32, offset u64 into
the data, which starts at the next multiple of ``general.alignment``. Counts, lengths and dimensions
are u32 in version 1, u64 from version 2 on. Source: ggml's docs/gguf.md.
"""

import struct
import sys
from dataclasses import dataclass
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from squall.kernels.quant.base import gguf_formats
from squall.loaders.errors import ModelLoadError

_VERSIONS = (1, 2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_DEPTH = 4  # arrays in arrays
_SLACK = 64 << 20  # bytes that opening may allocate besides twice the file's size
_STRING, _BOOL, _ARRAY = 8, 7, 9
_SCALARS = {  # GGUF value type -> struct code, numpy type
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    _BOOL: ("<B", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_OTHER_TYPES = {  # GGML types that exist but are not supported: named in the error
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table; ``shape`` in PyTorch's order, ``offset`` into the data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """All of a file but the tensor data, which starts at byte ``data_start``."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_start: int

    def split(self, key: str) -> int:
        """The integer ``split.*`` value under ``key``; 0 when absent."""
        value = self.metadata.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelLoadError(f"{self.path}: metadata key {key!r} must be a count")
        return value


def read_header(path: Path, data: mmap) -> Header:
    """Read and check everything before the tensor data, and where the tensors lie."""
    return _Reader(path, data).header()


class _Reader:
    """A cursor over the file; every read checks what is left of it first."""

    def __init__(self, path: Path, data: mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.budget = 2 * self.size + _SLACK
        self.where = "header"  # what is being read, for messages
        self.wide = True  # counts, lengths and dimensions take eight bytes

    def fail(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {self.where}: {message}")

    def need(self, length: int) -> int:
        """Take ``length`` bytes; returns where they start."""
        start = self.at
        if length > self.size - start:
            raise self.fail(
                f"needs {length} bytes at offset {start}, the file ends after {self.size}"
            )
        self.at = start + length
        return start

    def charge(self, nbytes: int) -> None:
        """Account for memory about to be allocated."""
        self.budget -= nbytes
        if self.budget < 0:
            raise self.fail("its metadata needs more memory than twice the file's size")

    def unpack(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.need(struct.calcsize(code)))[0]

    def u32(self) -> int:
        return int(self.unpack("<I"))

    def length(self) -> int:
        return int(self.unpack("<Q" if self.wide else "<I"))

    def count(self, minimum_bytes: int, what: str) -> int:
        """A number of things that take at least ``minimum_bytes`` each."""
        count = self.length()
        if count * minimum_bytes > self.size - self.at:
            raise self.fail(f"{count} {what} do not fit in the file of {self.size} bytes")
        return count

    def string(self) -> str:
        length = self.length()
        start = self.need(length)
        # The worst case is one character beyond U+FFFF: four bytes for each character.
        self.charge(64 + (4 * length if length > 1024 else length))
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(
                f"string at offset {start} is not UTF-8: {error.reason} at byte {error.start}"
            ) from error

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise self.fail(f"is not a GGUF file: starts with {self.data[:4]!r}, not b'GGUF'")
        self.at = 4
        version = self.u32()
        if version & 0xFFFF == 0 and version:
            raise self.fail("big-endian GGUF file; only little-endian files are supported")
        if version not in _VERSIONS:
            raise self.fail(f"GGUF version {version} is not supported; supported: 1, 2, 3")
        self.wide = version > 1
        width = 8 if self.wide else 4
        tensor_count = self.count(width + 4 + 4 + 8, "tensors")
        key_count = self.count(width + 4 + 1, "metadata keys")
        metadata = self.metadata(key_count)
        alignment = self.alignment(metadata)
        tensors = self.tensor_table(tensor_count)
        self.where = "tensor data"
        start = -(-self.at // alignment) * alignment
        self.check_places(tensors, start, alignment)
        return Header(self.path, version, metadata, tensors, start)

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for index in range(count):
            self.where = f"metadata key {index}"
            self.charge(160)  # a dict entry and a value object
            key = self.string()
            if not key:
                raise self.fail("its name is empty")
            self.where = f"metadata key {key[:80]!r}"
            if key in values:
                raise self.fail("occurs twice")
            values[key] = self.value(self.u32(), 0)
        return values

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"value type {kind} is not known; known: 0 to 12")
        value = self.unpack(_SCALARS[kind][0])
        if kind == _BOOL and value > 1:
            raise self.fail(f"boolean has the value {value}, not 0 or 1")
        return bool(value) if kind == _BOOL else value

    def array(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self.fail(f"arrays are nested more than {_MAX_DEPTH} deep")
        kind = self.u32()
        if kind in _SCALARS:
            return self.numbers(kind)
        width = 8 if self.wide else 4
        if kind == _STRING:
            return self.strings(self.count(width, "strings"))
        if kind == _ARRAY:
            count = self.count(4 + width, "arrays")
            self.charge(192 * count)  # list slots and array objects
            return [self.array(depth + 1) for _ in range(count)]
        raise self.fail(f"array element type {kind} is not known; known: 0 to 12")

    def numbers(self, kind: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_SCALARS[kind][1])
        count = self.count(dtype.itemsize, "array elements")
        start = self.need(count * dtype.itemsize)
        self.charge(128 + count * dtype.itemsize)
        numbers = np.frombuffer(self.data, dtype, count, start).copy()
        if kind != _BOOL:
            return numbers
        if count and numbers.max() > 1:
            raise self.fail(f"boolean array has the value {numbers.max()}, not 0 or 1")
        return numbers.view(np.bool_)

    def strings(self, count: int) -> list[str]:
        """``string`` ``count`` times; spelled out because vocabularies are long."""
        data, size, at = self.data, self.size, self.at
        prefix = struct.Struct("<Q" if self.wide else "<I")
        values: list[str] = []
        for _ in range(count):
            start = at + prefix.size
            if start > size:
                self.at = at
                self.need(prefix.size)
            length = prefix.unpack_from(data, at)[0]
            if length > 1024 or length > size - start:  # long, or past the end
                self.at = at
                values.append(self.string())
                at = self.at
                continue
            at = start + length
            try:
                value = str(data[start:at], "utf-8")
            except UnicodeDecodeError:
                self.at = start - prefix.size
                value = self.string()
            self.budget -= sys.getsizeof(value) + 8
            if self.budget < 0:
                self.charge(0)
            values.append(value)
        self.at = at
        return values

    def alignment(self, metadata: dict[str, Any]) -> int:
        self.where = "metadata key 'general.alignment'"
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(f"is {type(value).__name__}, not an integer")
        if value < 1 or value & (value - 1):
            raise self.fail(f"{value} is not a power of two")
        return value

    def tensor_table(self, count: int) -> tuple[TensorInfo, ...]:
        names: set[str] = set()
        tensors = []
        for index in range(count):
            self.where = f"tensor {index}"
            self.charge(512)
            name = self.string()
            if not name:
                raise self.fail("its name is empty")
            self.where = f"tensor {name[:80]!r}"
            if name in names:
                raise self.fail("occurs twice")
            names.add(name)
            tensors.append(self.tensor(name))
        return tuple(tensors)

    def tensor(self, name: str) -> TensorInfo:
        dims = self.u32()
        if dims > _MAX_DIMS:
            raise self.fail(f"has {dims} dimensions; at most {_MAX_DIMS} are allowed")
        shape = tuple(self.length() for _ in range(dims))[::-1]
        if 0 in shape:
            raise self.fail(f"shape {list(shape)} has no elements")
        code = self.u32()
        entry = gguf_formats().get(code)
        if entry is None:
            name_of = f" ({_OTHER_TYPES[code]})" if code in _OTHER_TYPES else ""
            known = ", ".join(f"{e.name} {c}" for c, e in gguf_formats().items())
            raise self.fail(f"type {code}{name_of} is not supported; supported: {known}")
        row = shape[-1] if shape else 1
        if row % entry.block_size:
            raise self.fail(
                f"rows of {row} weights are no multiple of {entry.name}'s {entry.block_size}"
            )
        nbytes = prod(shape[:-1]) * entry.row_bytes(row)
        if nbytes > self.size:
            raise self.fail(
                f"shape {list(shape)} of {entry.name} takes {nbytes} bytes, the file has "
                f"{self.size}: truncated or damaged"
            )
        return TensorInfo(name, shape, code, nbytes, int(self.unpack("<Q")))

    def check_places(self, tensors: tuple[TensorInfo, ...], start: int, alignment: int) -> None:
        """Offsets are aligned, data lies within the file, no byte belongs to two tensors."""
        end, previous = 0, ""
        for info in sorted(tensors, key=lambda info: info.offset):
            self.where = f"tensor {info.name[:80]!r}"
            if info.offset % alignment:
                raise self.fail(f"offset {info.offset} is no multiple of {alignment}")
            if start + info.offset + info.nbytes > self.size:
                raise self.fail(
                    f"its {info.nbytes} bytes at offset {start + info.offset} run past the end "
                    f"of the file ({self.size} bytes): truncated or damaged"
                )
            if info.offset < end:
                raise self.fail(f"its bytes overlap those of {previous[:80]!r}")
            end, previous = info.offset + info.nbytes, info.name
