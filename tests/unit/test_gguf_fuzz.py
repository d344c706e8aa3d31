"""Mutated and memory-hungry GGUF files: an error or a readable file, and never much memory."""

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from squall.loaders import gguf_header
from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile

MUTANTS = 2500
HUGE = (2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def seed_file(path: Path) -> Path:
    """A small file with a bit of everything."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(32)
    writer.add_block_count(2)
    writer.add_array("words", [f"tok{i}" for i in range(40)] + ["", "▁x", "🌪"])
    writer.add_array("scores", [float(i) for i in range(40)])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_bool("flag", True)
    writer.add_float64("pi", 3.14)
    values = np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32)
    writer.add_tensor("f32", values)
    writer.add_tensor("f16", values[0, :5].astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_K):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.full((2, 256 // block * size), 17, dtype=np.uint8)
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutant(source: random.Random, seed: bytes, places: list[int]) -> bytes:
    data = bytearray(seed)
    for _ in range(source.choice((1, 1, 1, 2, 5))):
        kind = source.randrange(6)
        at = source.choice(places)
        if kind == 0:  # bit flip
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:  # any byte
            data[at] = source.randrange(256)
        elif kind == 2:  # a length, count, offset or dimension set to something huge
            data[at : at + 8] = struct.pack("<Q", source.choice(HUGE))
        elif kind == 3:  # the same, small
            data[at : at + 4] = struct.pack("<I", source.randrange(64))
        elif kind == 4:  # cut out
            del data[at : at + source.randrange(1, 40)]
        else:  # splice
            start = source.choice(places)
            data[at:at] = seed[start : start + source.randrange(1, 40)]
        places = places[: max(1, len(data) - 8)]
    return bytes(data[: source.randrange(len(data))] if source.random() < 0.1 else data)


def outcome(path: Path) -> str:
    """ "readable", or the error's message."""
    try:
        file = GGUFFile.open(path)
    except ModelLoadError as error:
        return str(error)
    for name, tensor in file.tensors.items():
        raw = file.raw(name)
        assert raw.numel() == tensor.nbytes
        assert int(raw[0, 0]) + int(raw[-1, -1]) >= 0  # both ends can be read
    return "readable"


def test_fuzz(tmp_path: Path) -> None:
    path = seed_file(tmp_path / "seed.gguf")
    assert outcome(path) == "readable"
    seed = path.read_bytes()
    places = list(range(4, min(t.offset for t in GGUFFile.open(path).tensors.values())))
    source = random.Random(20240607)
    readable = 0
    started = time.monotonic()
    tracemalloc.start()
    try:
        for number in range(MUTANTS):
            content = mutant(source, seed, places)
            path = tmp_path / f"{number}.gguf"
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            message = outcome(path)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 2 * len(content) + (256 << 10), (number, peak)
            assert "\n" not in message
            assert message == "readable" or message.startswith(f"{path}: ")
            readable += message == "readable"
            path.unlink()
    finally:
        tracemalloc.stop()
    assert 100 < readable < MUTANTS - 100  # both branches are exercised
    assert time.monotonic() - started < 60  # nothing hangs


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short strings cost Python far more than they take in the file: refused in time."""
    monkeypatch.setattr(gguf_header, "_SLACK", 0)
    count = 100_000
    path = tmp_path / "words.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", [f"{i % 89 + 10}" for i in range(count)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError, match="more memory than twice"):
            GGUFFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * path.stat().st_size
