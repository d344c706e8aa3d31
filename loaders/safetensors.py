"""Safetensors folders, read by slices over memory-mapped files.

A file is ``u64 little-endian N``, ``N`` bytes of JSON, then the data. The JSON maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` with offsets relative to the data, plus an
optional ``__metadata__`` of strings. The data must be covered without gap or overlap. Format:
https://github.com/huggingface/safetensors#format. Everything is checked against the file's size
before any byte of data is touched; tensors are views of the mapping, so nothing is read until it
is used. All errors are ``ModelLoadError`` naming file and tensor.
"""

import json
import math
import mmap
import platform
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from squall.loaders.errors import ModelLoadError
from squall.loaders.hf_config import read_json, shorten

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
INDEX_LIMIT: Final = 128 << 20
_HEADER_LIMIT: Final = 100_000_000  # bytes, the limit of the reference implementation
_MAX_RANK: Final = 64
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

_DTYPE_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, attribute)
    for name, attribute in _DTYPE_NAMES.items()
    if hasattr(torch, attribute)  # some builds lack the newer types
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` and ``end`` are byte offsets from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(data: mmap.mmap | bytes, path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a whole file's bytes; names in order of their offsets."""
    if len(data) < 8:
        raise ModelLoadError(f"{path}: {len(data)} bytes, too short for a safetensors header")
    length: int = struct.unpack_from("<Q", data)[0]
    limit = min(len(data) - 8, _HEADER_LIMIT)
    if not 2 <= length <= limit:
        raise ModelLoadError(f"{path}: header of {length} bytes, at most {limit} are possible here")
    raw = bytes(data[8 : 8 + length])
    if raw[:1] != b"{":
        raise ModelLoadError(f"{path}: not a safetensors file, the header is not a JSON object")
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except RecursionError:
        raise ModelLoadError(f"{path}: header JSON is nested too deeply") from None
    except ValueError as error:  # also not UTF-8, a key given twice, integers of absurd length
        raise ModelLoadError(f"{path}: bad safetensors header: {error}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelLoadError(f"{path}: __metadata__ in the header must map names to strings")
    start = 8 + length
    infos = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    return _check_cover(path, infos, start, len(data))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {shorten(name)} is given twice")
            seen.add(name)
    return result


def _no_float(text: str) -> None:
    raise ValueError(f"number {shorten(text)} where only integers are accepted")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    where = f"{path}: tensor {shorten(name, 200)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        raise ModelLoadError(f"{where}: dtype {shorten(entry['dtype'])} unknown; known: {known}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        raise ModelLoadError(f"{where}: shape must be at most {_MAX_RANK} integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ModelLoadError(f"{where}: data_offsets must be two integers >= 0")
    begin, end = offsets
    # Zeros count as one: torch multiplies strides even of empty tensors, and must not overflow.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise ModelLoadError(f"{where}: shape {shape} overflows 64-bit sizes")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ModelLoadError(
            f"{where}: {end - begin} bytes at [{begin}, {end}), but shape {shape} of "
            f"{entry['dtype']} needs {math.prod(shape) * dtype.itemsize}"
        )
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _check_cover(
    path: Path, infos: dict[str, TensorInfo], start: int, size: int
) -> dict[str, TensorInfo]:
    """The tensors by offset, which must follow each other from ``start`` to ``size``."""
    ordered = sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end))
    position = start
    for name, info in ordered:
        if info.end > size:
            raise ModelLoadError(
                f"{path}: tensor {shorten(name, 200)} ends at byte {info.end}, but the file has "
                f"{size}: it is truncated or damaged"
            )
        if info.begin != position:
            problem = "overlaps the one before it" if info.begin < position else "leaves a gap"
            raise ModelLoadError(
                f"{path}: tensor {shorten(name, 200)} {problem} (byte {info.begin}, "
                f"expected {position})"
            )
        position = info.end
    if position != size:
        raise ModelLoadError(f"{path}: {size - position} bytes after the last tensor")
    return dict(ordered)


def _map_file(path: Path) -> mmap.mmap:
    """Map a file privately: writable for torch (it warns about read-only memory), while nothing
    ever reaches the file."""
    try:
        with path.open("rb") as file:
            if platform.machine() in ("x86_64", "aarch64") and sys.platform == "linux":
                # Without MAP_NORESERVE (0x4000 here; the mmap module lacks it before 3.13) a file
                # larger than RAM cannot be mapped privately.
                return mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | 0x4000,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file") from None
    except ValueError:  # mmap's word for an empty file
        raise ModelLoadError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None


class SafetensorsFile:
    """One mapped file. Tensors keep the mapping alive; there is nothing to close."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        self.infos: Mapping[str, TensorInfo] = parse_header(self._map, path)

    def view(self, info: TensorInfo, begin: int, shape: Sequence[int]) -> Tensor:
        """A tensor of ``shape`` at byte ``begin``: a view, or a copy if it lies unaligned."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=info.dtype)
        size = info.dtype.itemsize
        if begin % size:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * size, offset=begin)
            return raw.clone().view(info.dtype).view(tuple(shape))
        flat = torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=begin)
        return flat.view(tuple(shape))

    def release(self, info: TensorInfo) -> None:
        """Drop the tensor's whole pages from this process; a later read gets them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
            end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class SafetensorsFolder:
    """The tensors of one checkpoint over all of its files."""

    def __init__(self, files: Sequence[SafetensorsFile]) -> None:
        self.files = tuple(files)
        self._owner: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        for file in files:
            for name, info in file.infos.items():
                if name in self._owner:
                    other = self.path(name).name
                    raise ModelLoadError(f"{file.path}: tensor {name} is also in {other}")
                self._owner[name] = file, info

    @classmethod
    def open(cls, source: Path | str | Iterable[Path | str]) -> "SafetensorsFolder":
        """Open a folder (its weight files are found by ``weight_files``) or the given files.

        When the files' folder has an index that lists them, every name it promises must be in
        the file it names.
        """
        given = (source,) if isinstance(source, (str, Path)) else source
        paths = tuple(map(Path, given))
        if len(paths) == 1 and paths[0].is_dir():
            paths = weight_files(paths[0])
        if not paths:
            raise ModelLoadError("no safetensors file was given")
        folder = cls([SafetensorsFile(path) for path in paths])
        index = paths[0].parent / INDEX_NAME
        if index.is_file() and any(path.name != SINGLE_NAME for path in paths):
            folder._check_index(index, read_weight_map(index))
        return folder

    def _check_index(self, index: Path, weight_map: Mapping[str, str]) -> None:
        opened = {file.path.name for file in self.files}
        if not opened <= set(weight_map.values()):
            return  # other files than the index speaks of
        for name, shard in weight_map.items():
            if shard not in opened:
                raise ModelLoadError(f"{index.parent / shard}: listed in {INDEX_NAME}, not opened")
            owner = self.path(name).name if name in self else None
            if owner != shard:
                found = f"found in {owner}" if owner else "not there"
                raise ModelLoadError(
                    f"{index}: tensor {shorten(name, 200)} should be in {shard}, but is {found}"
                )

    def renamed(self, rename: Callable[[str], str | None]) -> "SafetensorsFolder":
        """The same files with tensors under other names; those it gives None are left out."""
        folder = SafetensorsFolder(())
        folder.files = self.files
        for stored, entry in self._owner.items():
            name = rename(stored)
            if name in folder._owner:
                raise ModelLoadError(f"{entry[0].path}: {stored} is there twice, as {name}")
            if name is not None:
                folder._owner[name] = entry
        return folder

    def names(self) -> list[str]:
        """All tensor names, file by file in order of their place in it."""
        return list(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.begin for _, info in self._owner.values())

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place; ``ModelLoadError`` when there is no such tensor."""
        return self._find(name)[1]

    def path(self, name: str) -> Path:
        """The file a tensor lies in."""
        return self._find(name)[0].path

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on the CPU: a view of the file (a copy only where it is unaligned).
        Writing to it changes this process's pages, never the file."""
        file, info = self._find(name)
        return file.view(info, info.begin, info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """``tensor(name)[start:stop]`` without touching the other rows."""
        file, info = self._find(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ModelLoadError(
                f"{file.path}: tensor {name} of shape {list(info.shape)} has no rows {start}:{stop}"
            )
        stride = math.prod(info.shape[1:]) * info.dtype.itemsize
        return file.view(info, info.begin + start * stride, (stop - start, *info.shape[1:]))

    def release(self, name: str) -> None:
        """Give the tensor's memory pages back once it has been copied to where it is used."""
        file, info = self._find(name)
        file.release(info)

    def _find(self, name: str) -> tuple[SafetensorsFile, TensorInfo]:
        found = self._owner.get(name)
        if found is None:
            where = self.files[0].path if len(self.files) == 1 else self.files[0].path.parent
            raise ModelLoadError(f"{where}: tensor {name} is missing")
        return found


def read_weight_map(index: Path) -> dict[str, str]:
    """``weight_map`` of an index file: tensor name to the plain file name of its shard."""
    weight_map = read_json(index, limit=INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map: expected an object of tensor names")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[^/\\\0:]+\.safetensors", shard)
        if not plain:
            raise ModelLoadError(
                f"{index}: weight_map: {shorten(name, 200)}: expected the name of a .safetensors "
                f"file in the same folder, found {shorten(shard)}"
            )
    return weight_map


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the model in ``folder``.

    ``model.safetensors``, else the shards of its index, else the only complete set of
    ``*.safetensors``. Raises ``ModelLoadError`` when there is none, a shard is missing, or the
    choice is not clear.
    """
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    index = folder / INDEX_NAME
    if index.is_file():
        shards = sorted(set(read_weight_map(index).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelLoadError(
                f"{folder}: shards listed in {INDEX_NAME} are missing: "
                f"{', '.join(missing[:3])}{rest}"
            )
        return tuple(folder / name for name in shards)
    names = choose_unindexed([path.name for path in folder.glob("*.safetensors")], str(folder))
    if not names:
        old = [p.name for s in ("bin", "pth", "pt") for p in folder.glob(f"*.{s}")]
        found = f"only {sorted(old)[0]}" if old else "no weights"
        raise ModelLoadError(f"{folder}: {found} found; safetensors or GGUF files are needed")
    return tuple(folder / name for name in names)


def choose_unindexed(names: Iterable[str], where: str) -> list[str]:
    """The one checkpoint among safetensors file names without an index; [] when there is none."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".safetensors") and not name.startswith("adapter_"):
            shard = _SHARD.fullmatch(name)
            groups.setdefault(f"{shard[1]}-*-of-{shard[3]}" if shard else name, []).append(name)
    if not groups:
        return []
    of_model = [key for key in groups if key.startswith("model-")]
    if len(groups) > 1 and len(of_model) != 1:
        listed = ", ".join(sorted(groups)[:5])
        raise ModelLoadError(
            f"{where}: several safetensors files and no {INDEX_NAME} to say which belong together: "
            f"{listed}"
        )
    key = of_model[0] if len(groups) > 1 else next(iter(groups))
    first = _SHARD.fullmatch(groups[key][0])
    if first:
        count = int(first[3])
        numbers = [int(shard[2]) for name in groups[key] if (shard := _SHARD.fullmatch(name))]
        if numbers != list(range(1, count + 1)):
            raise ModelLoadError(
                f"{where}: {len(numbers)} of the {count} shards {key}.safetensors found"
            )
    return groups[key]
