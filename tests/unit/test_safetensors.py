"""The safetensors reader: layouts, folders, and a fuzz over damaged files."""

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from squall.loaders.errors import ModelLoadError
from squall.loaders.safetensors import (
    DTYPES,
    INDEX_NAME,
    SafetensorsFolder,
    parse_header,
    weight_files,
)


def raw_file(path: Path, header: object, data: bytes = b"", pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {"w": torch.randn(5, 7, generator=generator), "scalar": torch.tensor(3.5)}
    tensors["empty"] = torch.empty(0, 4)
    tensors["half"] = torch.randn(3, 2, 2, generator=generator).half()
    return tensors


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    tensors = sample()
    for name, dtype in DTYPES.items():
        raw = torch.arange(4 * dtype.itemsize, dtype=torch.uint8)
        tensors[f"t.{name}"] = (raw % 2).bool() if name == "BOOL" else raw.view(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = SafetensorsFolder.open(tmp_path)
    assert set(folder.names()) == set(tensors)
    for name, expected in tensors.items():
        actual = folder.tensor(name)
        assert folder.info(name).shape == tuple(expected.shape)
        assert folder.info(name).dtype == expected.dtype == actual.dtype
        assert actual.shape == expected.shape
        assert actual.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))
    assert folder.nbytes == sum(t.nbytes for t in tensors.values())


def test_views_share_the_mapping_and_writes_stay_private(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(6.0)}, path)
    before = path.read_bytes()
    folder = SafetensorsFolder.open(path)
    first, second = folder.tensor("w"), folder.tensor("w")
    assert first.data_ptr() == second.data_ptr()
    del folder
    first[0] = 99.0
    assert second[0] == 99.0
    assert path.read_bytes() == before


def test_release_drops_pages_and_reads_again(tmp_path: Path) -> None:
    data = torch.arange(1 << 16, dtype=torch.int32)
    save_file({"w": data}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder.open(tmp_path)
    view = folder.tensor("w")
    folder.release("w")
    assert view.equal(data)


def test_rows(tmp_path: Path) -> None:
    tensors = sample()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder.open(tmp_path)
    assert folder.rows("w", 1, 4).equal(tensors["w"][1:4])
    assert folder.rows("half", 2, 3).equal(tensors["half"][2:3])
    assert folder.rows("w", 2, 2).shape == (0, 7)
    for name, start, stop in [("w", 0, 6), ("w", -1, 2), ("w", 3, 2), ("scalar", 0, 1)]:
        with pytest.raises(ModelLoadError, match=f"tensor {name} .*has no rows {start}:{stop}"):
            folder.rows(name, start, stop)


@pytest.mark.parametrize("pad", range(8))
def test_unaligned_data(tmp_path: Path, pad: int) -> None:
    header = {"b": entry("U8", [3], 0, 3), "w": entry("F64", [2, 2], 3, 35)}
    data = bytes([1, 2, 3]) + struct.pack("<4d", 1, 2, 3, 4)
    folder = SafetensorsFolder.open(raw_file(tmp_path / "m.safetensors", header, data, pad))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert folder.tensor("w").equal(expected)
    assert folder.rows("w", 1, 2).equal(expected[1:])
    assert folder.tensor("w").data_ptr() % 8 == 0


BAD_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "gap": ({"a": entry("U8", [1], 1, 2)}, b"ab", "tensor 'a' leaves a gap"),
    "overlap": (
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)},
        b"abc",
        "tensor 'b' overlaps",
    ),
    "trailing": ({"a": entry("U8", [1], 0, 1)}, b"ab", "1 bytes after the last tensor"),
    "past end": ({"a": entry("U8", [9], 0, 9)}, b"ab", "truncated or damaged"),
    "wrong size": ({"a": entry("F32", [2], 0, 2)}, b"ab", r"shape \[2\] of F32 needs 8"),
    "backwards": ({"a": entry("U8", [0], 2, 1)}, b"ab", "-1 bytes"),
    "overflow": ({"a": entry("U8", [2**62, 2**62], 0, 0)}, b"", "overflows"),
    "empty overflow": ({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, b"", "overflows"),
    "wraps to size": ({"a": entry("F32", [2**62 + 1], 0, 4)}, b"abcd", "overflows"),
    "negative": ({"a": entry("U8", [-1], 0, 0)}, b"", "shape must be"),
    "rank": ({"a": entry("U8", [1] * 65, 0, 1)}, b"a", "shape must be"),
    "bool": ({"a": entry("U8", [True], 0, 1)}, b"a", "shape must be"),
    "offsets": ({"a": {**entry("U8", [1], 0, 1), "data_offsets": [0]}}, b"a", "two integers"),
    "dtype": ({"a": entry("Q4", [1], 0, 1)}, b"a", "dtype 'Q4' unknown; known: F64"),
    "dtype list": ({"a": {**entry("U8", [1], 0, 1), "dtype": []}}, b"a", "unknown"),
    "extra key": ({"a": {**entry("U8", [1], 0, 1), "x": 1}}, b"a", "expected exactly"),
    "not an object": ({"a": 3}, b"", "expected exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "list": (b"[1, 2]", b"", "not a safetensors file"),
    "float": (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"a", "only integers"),
    "twice": (b'{"a": 1, "a": 2}', b"", "key 'a' is given twice"),
    "utf-8": (b'{"\xff": 1}', b"", "bad safetensors header"),
    "json": (b"{]", b"", "bad safetensors header"),
    "deep": (b'{"a":' * 50_000, b"", "nested too deeply"),
    "digits": (b'{"a":' + b"1" * 9999 + b"}", b"", "bad safetensors header"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelLoadError, match=message) as caught:
        SafetensorsFolder.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), b"\0" * 64])
def test_not_a_file_of_this_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        SafetensorsFolder.open(tmp_path)


def write_shards(folder: Path, parts: list[dict[str, torch.Tensor]], prefix: str = "model") -> None:
    count = len(parts)
    names = [f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_sharded_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"a": torch.ones(2)}, {"b": torch.zeros(3)}])
    assert [p.name for p in weight_files(tmp_path)] == list(SHARDS)  # by the names alone
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    folder = SafetensorsFolder.open(tmp_path)
    assert folder.names() == ["a", "b"]
    assert folder.path("b").name == SHARDS[1]
    assert SafetensorsFolder.open(weight_files(tmp_path)).names() == ["a", "b"]
    with pytest.raises(ModelLoadError, match="tensor c is missing"):
        folder.tensor("c")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "'a': expected the name of a .safetensors file"),
        ({"a": "/etc/passwd"}, "expected the name"),
        ({"a": "C:\\x.safetensors"}, "expected the name"),
        ({"a": 3}, "expected the name"),
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": SHARDS[0], "b": "model-00009-of-00009.safetensors"}, "missing: model-00009"),
        ({"a": SHARDS[0], "b": SHARDS[0], "x": SHARDS[1]}, "'b' should be in"),
        ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "'c' should be in .* not there"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, message: str) -> None:
    write_shards(tmp_path, [{"a": torch.ones(2)}, {"b": torch.zeros(3)}])
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelLoadError, match=message):
        SafetensorsFolder.open(tmp_path)


def test_same_name_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"a": torch.ones(2)}, {"a": torch.zeros(2)}])
    with pytest.raises(ModelLoadError, match=f"{SHARDS[1]}: tensor a is also in {SHARDS[0]}"):
        SafetensorsFolder.open(tmp_path)


def _lone(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "weights.safetensors")


def _with_adapter(folder: Path) -> None:
    _lone(folder)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def _with_consolidated(folder: Path) -> None:
    write_shards(folder, [{"a": torch.ones(2)}, {"b": torch.zeros(3)}])
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (_lone, ["weights.safetensors"]),
        (_with_adapter, ["weights.safetensors"]),
        (_with_consolidated, list(SHARDS)),
    ],
)
def test_folders_without_index(
    tmp_path: Path, fill: Callable[[Path], None], expected: list[str]
) -> None:
    fill(tmp_path)
    assert [path.name for path in weight_files(tmp_path)] == expected


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no weights found; safetensors or GGUF"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"only pytorch_model\.bin found; safetensors or GGUF"):
        weight_files(tmp_path)
    _lone(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelLoadError, match="several safetensors files"):
        weight_files(tmp_path)


def test_incomplete_shard_set(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"a": torch.ones(2)}, {"b": torch.zeros(3)}])
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(ModelLoadError, match="1 of the 2 shards"):
        weight_files(tmp_path)


def test_fuzz_damaged_files_fail_or_read_in_bounds(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sample(), path, metadata={"format": "pt"})
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    rng = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for round_ in range(2500):
        data = bytearray(good)
        if round_ % 5 == 4:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.randrange(1, 4)):
            if data:
                at = rng.randrange(min(len(data), header if round_ % 3 else len(data)))
                data[at] = data[at] ^ (1 << rng.randrange(8)) if round_ % 2 else rng.randrange(256)
        try:
            infos = parse_header(bytes(data), path)
        except ModelLoadError as error:
            message = str(error)
            outcomes["refused"] += str(path) in message and "\n" not in message
            continue
        path.write_bytes(data)
        folder = SafetensorsFolder.open(path)
        assert set(folder.names()) == set(infos)
        for name in folder.names():
            tensor = folder.tensor(name).clone()
            assert tensor.shape == folder.info(name).shape
            assert tensor.nbytes == infos[name].end - infos[name].begin
        outcomes["read"] += 1
    assert outcomes["read"] > 50
    assert sum(outcomes.values()) == 2500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB


def test_renamed_tensors(tmp_path: Path) -> None:
    save_file(
        {"a.x": torch.ones(2), "b.x": torch.zeros(3), "c": torch.ones(1)},
        tmp_path / "m.safetensors",
    )
    folder = SafetensorsFolder.open(tmp_path)
    part = folder.renamed(lambda name: name[2:] if name.startswith("a.") else None)
    assert part.names() == ["x"]
    assert part.nbytes == 8
    assert torch.equal(part.tensor("x"), torch.ones(2))
    with pytest.raises(ModelLoadError, match=r"tensor a\.x is missing"):
        part.tensor("a.x")
    with pytest.raises(ModelLoadError, match=r"b\.x is there twice, as x"):
        folder.renamed(lambda name: name[2:] if "." in name else None)
