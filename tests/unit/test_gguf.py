"""Reading GGUF files: round trips, split files, and a table of bad ones."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + u32(kind) + payload


def row(name: str = "w", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    """One entry of the tensor table; ``dims`` in GGUF's order."""
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    keys: tuple[bytes, ...] = (),
    rows: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, key_count = counts or (len(rows), len(keys))
    head = b"GGUF" + u32(version) + u64(tensor_count) + u64(key_count) + b"".join(keys + rows)
    return head + b"\0" * (-len(head) % alignment) + data


def save(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


GOOD = build((key("a", U32, u32(7)),), (row(),), bytes(256))


def nested(depth: int) -> bytes:
    """The payload of an array with ``depth`` levels of arrays around one byte."""
    return (u32(ARRAY) + u64(1)) * depth + u32(U8) + u64(1) + b"\1"


def test_writer_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, tuple[Callable[[str, Any], None], Any]] = {
        "u8": (writer.add_uint8, 255), "i8": (writer.add_int8, -128),
        "u16": (writer.add_uint16, 65535), "i16": (writer.add_int16, -32768),
        "u32": (writer.add_uint32, 2**32 - 1), "i32": (writer.add_int32, -(2**31)),
        "u64": (writer.add_uint64, 2**64 - 1), "i64": (writer.add_int64, -(2**63)),
        "f32": (writer.add_float32, 0.5), "f64": (writer.add_float64, 0.1),
        "yes": (writer.add_bool, True), "text": (writer.add_string, "naïve 🌪️ 風\n\0"),
        "ints": (writer.add_array, [1, -2, 3]), "floats": (writer.add_array, [0.25, -4.0]),
        "words": (writer.add_array, ["", "a", "▁the", "x" * 3000, "🦙"]),
        "flags": (writer.add_array, [True, False]), "deep": (writer.add_array, [[1, 2], [3]]),
    }  # fmt: skip
    for name, (add, value) in values.items():
        add(name, value)
    random_state = np.random.default_rng(0)
    weights = {
        "f32": random_state.standard_normal((3, 5), dtype=np.float32),
        "f16": random_state.standard_normal((2, 3, 4)).astype(np.float16),
        "line": random_state.standard_normal(7, dtype=np.float32),
    }
    for name, array in weights.items():
        writer.add_tensor(name, array)
    packed = gguf.quants.quantize(
        random_state.standard_normal((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("q4", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    bf16 = torch.randn(2, 8).to(torch.bfloat16)
    writer.add_tensor(
        "bf16", bf16.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile.open(path)
    assert file.version == 3
    assert file.path == path
    assert file.get_str("general.architecture") == "llama"
    for name, (_, value) in values.items():
        found = file.metadata[name]
        if name == "deep":
            found = [inner.tolist() for inner in found]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, name
    for name, array in weights.items():
        assert file.tensors[name].shape == array.shape
        assert torch.equal(file.dense(name), torch.from_numpy(array))
    assert torch.equal(file.dense("bf16"), bf16)
    entry = file.tensors["q4"]
    assert (entry.shape, entry.ggml_type, entry.nbytes, entry.rows) == ((4, 64), 3, 160, 4)
    assert torch.equal(file.raw("q4"), torch.from_numpy(packed))
    assert entry.format.dequantize(file.raw("q4")).shape == (4, 64)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    def size(value: int) -> bytes:
        return u32(value) if version == 1 else u64(value)

    def word(value: str) -> bytes:
        return size(len(value)) + value.encode()

    words = u32(STRING) + size(2) + word("ab") + word("c")
    head = b"GGUF" + u32(version) + size(2) + size(3)
    head += word("general.alignment") + u32(U32) + u32(64)
    head += word("words") + u32(ARRAY) + words
    head += word("pi") + u32(F32) + struct.pack("<f", 3.5)
    head += word("w") + u32(2) + size(4) + size(3) + u32(0) + u64(64)
    head += word("scalar") + u32(0) + u32(0) + u64(0)
    weights = torch.arange(12, dtype=torch.float32).view(3, 4)
    data = struct.pack("<f", 9.0).ljust(64, b"\0") + weights.numpy().tobytes()
    file = GGUFFile.open(save(tmp_path, head + b"\0" * (-len(head) % 64) + data))
    assert file.version == version
    assert file.get_list("words") == ["ab", "c"]
    assert file.get_float("pi") == 3.5
    assert torch.equal(file.dense("w"), weights)
    assert file.dense("scalar").shape == ()
    assert file.dense("scalar").item() == 9.0


def test_tensors_outlive_the_file_object(tmp_path: Path) -> None:
    content = build((), (row(dims=(8, 4)),), bytes(range(128)))
    file = GGUFFile.open(save(tmp_path, content))
    raw = file.raw("w")
    assert raw.data_ptr() == file.raw("w").data_ptr()  # zero-copy
    file.release("w")
    del file
    assert raw.flatten().tolist() == list(range(128))


def test_unaligned_dense_tensor(tmp_path: Path) -> None:
    key_one = key("general.alignment", U32, u32(1))
    values = struct.pack("<3f", 1.0, -2.0, 3.0)
    for pad in range(1, 5):
        rows = (row("pad", (pad,), 0, 0), row("w", (3,), 0, 4 * pad))
        content = build((key_one, key("x" * pad, U8, b"\0")), rows, bytes(4 * pad) + values, 3, 1)
        file = GGUFFile.open(save(tmp_path, content, f"{pad}.gguf"))
        assert file.dense("w").tolist() == [1.0, -2.0, 3.0]


def test_typed_reads(tmp_path: Path) -> None:
    keys = (
        key("i", I32, struct.pack("<i", -3)),
        key("f", F32, struct.pack("<f", 0.5)),
        key("b", BOOL, b"\1"),
        key("s", STRING, text("hi")),
        key("n", ARRAY, u32(U16) + u64(2) + struct.pack("<HH", 5, 6)),
    )
    file = GGUFFile.open(save(tmp_path, build(keys)))
    assert (file.get_int("i"), file.get_float("i"), file.get_float("f")) == (-3, -3.0, 0.5)
    assert (file.get_bool("b"), file.get_str("s"), file.get_list("n")) == (True, "hi", [5, 6])
    assert file.get_int("none", None) is None
    assert file.get_str("none", "x") == "x"
    wrong = [
        (file.get_int, "f", "an integer"), (file.get_int, "b", "an integer"),
        (file.get_float, "s", "a number"), (file.get_float, "b", "a number"),
        (file.get_bool, "i", "a boolean"), (file.get_str, "n", "a string"),
        (file.get_list, "s", "an array"),
    ]  # fmt: skip
    for read, name, expected in wrong:
        with pytest.raises(
            ModelLoadError, match=rf"model\.gguf: metadata key '{name}'.*{expected}"
        ):
            read(name)
    with pytest.raises(ModelLoadError, match=r"model\.gguf: metadata key 'zz' is missing"):
        file.get_int("zz")
    with pytest.raises(ModelLoadError, match="tensor 'zz' is missing"):
        file.raw("zz")


def test_dense_refuses_quantised_tensors(tmp_path: Path) -> None:
    file = GGUFFile.open(save(tmp_path, build((), (row(dims=(32,), kind=2),), bytes(18))))
    with pytest.raises(ModelLoadError, match="'w' is Q4_0; accepted: F32, F16, BF16"):
        file.dense("w")


ONE = (row(),)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "three bytes": (b"GGU", "3 bytes"),
    "magic only": (b"GGUF", "ends after 4"),
    "magic": (b"FUGG" + GOOD[4:], "not a GGUF file"),
    "zip": (b"PK\3\4" + GOOD[4:], "not a GGUF file"),
    "version 0": (build(version=0), "version 0"),
    "version 4": (build(version=4), "version 4 is not supported; supported: 1, 2, 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no counts": (b"GGUF" + u32(3), "header"),
    "tensor count": (build(counts=(2**63, 0)), "tensors do not fit"),
    "tensor count, one more": (build((), ONE, bytes(256), 3, 32, (2, 0)), "tensor 1: its name is"),
    "key count": (build(counts=(0, 2**64 - 1)), "metadata keys do not fit"),
    "key length": (build((u64(2**40) + b"a",)), "fit|needs"),
    "key empty": (build((key("", U8, b"\0"),)), "empty"),
    "key not UTF-8": (build((key(b"\xff\xfe", U8, b"\0"),)), "not UTF-8"),
    "key twice": (build((key("a", U8, b"\0"), key("a", U8, b"\0"))), "'a': occurs twice"),
    "value type": (build((key("a", 13, b"\0"),)), "value type 13"),
    "value type, large": (build((key("a", 2**32 - 1, b"\0"),)), "value type 4294967295"),
    "value cut off": (build((key("a", U64, b"\0"),), alignment=1), "needs 8 bytes"),
    "bool 2": (build((key("a", BOOL, b"\2"),)), "boolean has the value 2"),
    "string length": (build((key("a", STRING, u64(2**63)),)), "needs"),
    "string not UTF-8": (build((key("a", STRING, text(b"\xc3(")),)), "not UTF-8"),
    "array type": (build((key("a", ARRAY, u32(99) + u64(1)),)), "element type 99"),
    "array length": (build((key("a", ARRAY, u32(F64) + u64(2**61)),)), "do not fit"),
    "array of bools": (build((key("a", ARRAY, u32(BOOL) + u64(2) + b"\1\3"),)), "value 3"),
    "strings length": (build((key("a", ARRAY, u32(STRING) + u64(2**60)),)), "do not fit"),
    "strings cut off": (
        build((key("a", ARRAY, u32(STRING) + u64(3) + text("x" * 9)),), alignment=1),
        "do not fit|needs",
    ),
    "strings not UTF-8": (
        build((key("a", ARRAY, u32(STRING) + u64(2) + text("x") + text(b"\x80")),)),
        "not UTF-8",
    ),
    "arrays length": (build((key("a", ARRAY, u32(ARRAY) + u64(2**50)),)), "do not fit"),
    "arrays too deep": (build((key("a", ARRAY, nested(60)),)), "nested more than 4"),
    "alignment 0": (build((key("general.alignment", U32, u32(0)),)), "power of two"),
    "alignment 3": (build((key("general.alignment", U32, u32(3)),)), "power of two"),
    "alignment type": (build((key("general.alignment", STRING, text("32")),)), "not an integer"),
    "name empty": (build((), (row(""),), bytes(256)), "empty"),
    "name twice": (build((), (row(), row(offset=256)), bytes(512)), "'w': occurs twice"),
    "name length": (build((), (u64(2**50) + bytes(64),)), "needs"),
    "five dimensions": (build((), (row(dims=(1, 1, 1, 1, 1)),), bytes(32)), "5 dimensions"),
    "dimension 0": (build((), (row(dims=(0, 2)),)), "no elements"),
    "dimension 2^63": (build((), (row(dims=(2**63, 2)),)), "takes"),
    "product overflows": (build((), (row(dims=(2**32, 2**32, 2**32, 4)),)), "takes"),
    "product wraps to 64": (build((), (row(dims=(4, 2**30 - 1, 2**30 + 1)),), bytes(64)), "takes"),
    "type 9": (build((), (row(kind=9),)), r"type 9 \(Q8_1\) is not supported; supported: F32 0,"),
    "type 20": (build((), (row(kind=20),)), r"'w': type 20 \(IQ4_NL\)"),
    "type 1000": (build((), (row(kind=1000),)), "type 1000 is not supported"),
    "row not whole blocks": (build((), (row(dims=(33,), kind=2),), bytes(64)), "multiple of Q4_0"),
    "row of a k-quant": (build((), (row(dims=(32, 8), kind=12),), bytes(256)), "Q4_K's 256"),
    "offset unaligned": (build((), (row(offset=8),), bytes(512)), "no multiple of 32"),
    "offset past the end": (build((), (row(offset=2**63),), bytes(256)), "past the end"),
    "data missing": (build((), ONE), "takes 256 bytes, the file has 96: truncated"),
    "data one byte short": (build((), ONE, bytes(255)), "truncated"),
    "overlap": (build((), (row(), row("v", offset=224)), bytes(512)), "overlap those of 'w'"),
    "same place": (build((), (row(), row("v")), bytes(512)), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = save(tmp_path, content)
    with pytest.raises(ModelLoadError, match=message) as caught:
        GGUFFile.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ModelLoadError):
            GGUFFile.open(save(tmp_path, GOOD[:length], f"{length}.gguf"))
    assert GGUFFile.open(save(tmp_path, GOOD)).raw("w").shape == (2, 128)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"none\.gguf: cannot be opened: No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        GGUFFile.open(tmp_path)


def write_shards(folder: Path, count: int, tensors_count: int | None = None) -> list[Path]:
    """A model of ``count`` tensors, one a shard; metadata in the first."""
    paths = []
    for number in range(count):
        keys = [
            key("split.no", U16, struct.pack("<H", number)),
            key("split.count", U16, struct.pack("<H", count)),
            key("split.tensors.count", I32, u32(tensors_count or count)),
        ]
        if number == 0:
            keys.append(key("general.name", STRING, text("whole")))
        content = build(tuple(keys), (row(f"w{number}"),), bytes([number] * 256))
        paths.append(save(folder, content, f"m-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_split_files(tmp_path: Path, opened: int) -> None:
    paths = write_shards(tmp_path, 3)
    file = GGUFFile.open(paths[opened])
    assert file.path == paths[0]
    assert file.get_str("general.name") == "whole"
    assert list(file.tensors) == ["w0", "w1", "w2"]
    assert [int(file.raw(name)[0, 0]) for name in file.tensors] == [0, 1, 2]


def test_broken_splits(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 3)
    paths[1].rename(tmp_path / "away")
    with pytest.raises(ModelLoadError, match=r"m-00002-of-00003\.gguf: missing"):
        GGUFFile.open(paths[0])
    shutil.copy(paths[2], paths[1])
    with pytest.raises(ModelLoadError, match=r"split\.no and split\.count are 2 and 3"):
        GGUFFile.open(paths[0])
    lonely = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelLoadError, match=r"must end in -NNNNN-of-00003\.gguf"):
        GGUFFile.open(lonely)
    (tmp_path / "other").mkdir()
    with pytest.raises(ModelLoadError, match=r"split\.tensors\.count is 4, .* hold 3"):
        GGUFFile.open(write_shards(tmp_path / "other", 3, tensors_count=4)[0])
