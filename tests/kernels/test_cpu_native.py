"""The native CPU library: compiling, caching, threads, and doing without."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from squall.kernels.native import build as native
from squall.kernels.native.team import team
from squall.kernels.quant import cpu_native
from squall.kernels.quant.base import QuantFormat, gguf_formats

QUANTISED = [entry for entry in gguf_formats().values() if entry.unpack is not None]

# What a process does first: enable() from two threads, and a product that must be right.
FIRST_USE = """
import threading, torch
from squall.kernels.quant import cpu_native
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.matmul import dequantize_rows, quant_matmul
answers = []
threads = [threading.Thread(target=lambda: answers.append(cpu_native.enable())) for _ in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
assert answers == 2 * [cpu_native.enable()], answers
raw = torch.arange(40 * 100).to(torch.uint8).view(100, 40)
raw[:, 1::20], raw[:, 3::20] = 0x3C, 0x38
x = torch.linspace(-1, 1, 300 * 64).view(300, 64)
weights = gguf_formats()[3].dequantize(raw)
assert (quant_matmul(x, raw, 3) - x @ weights.t()).abs().max() < 1e-2 < weights.abs().max()
assert torch.equal(dequantize_rows(raw, torch.tensor([7]), 3, torch.float32), weights[7:8])
"""
TELL = FIRST_USE + "print(answers[0])\n"
# Tasks before and after, with one thread and with three, and again.
THREADS = """
import os
from pathlib import Path
import torch
torch.set_num_threads(1)
tasks = lambda: len(os.listdir("/proc/self/task"))
def grown(run):
    before = tasks()
    run()
    return tasks() - before
""" + FIRST_USE.replace("threading, torch", "threading") + """
print(grown(lambda: quant_matmul(x, raw, 3)))
torch.set_num_threads(3)
print(grown(lambda: quant_matmul(x, raw, 3)), grown(lambda: quant_matmul(x, raw, 3)))
expected = quant_matmul(x, raw, 3)
child = os.fork()
if child == 0:  # it has none of its parent's threads
    same = torch.equal(quant_matmul(x, raw, 3), expected)
    os._exit(0 if same and grown(lambda: None) == 0 and tasks() == 3 else 1)
print(os.waitpid(child, 0)[1])
"""  # fmt: skip

# One caller gets the team, the others do their work alone; short jobs chase each other.
CONCURRENT = (
    """
import torch
from concurrent.futures import ThreadPoolExecutor
"""
    + FIRST_USE
    + """
torch.set_num_threads(4)
small = x[:2].contiguous()
expected = quant_matmul(x, raw, 3), quant_matmul(small, raw, 3)
def work(seed):
    for i in range(300):
        large = (i + seed) % 10 == 0
        y = quant_matmul(x if large else small, raw, 3)
        assert torch.equal(y, expected[0 if large else 1])
with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
print("done")
"""
)


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    chosen = {k: v for k, v in os.environ.items() if k not in ("CC", "OMP_NUM_THREADS")}
    chosen |= {"SQUALL_CACHE": str(cache), **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=chosen)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(stdout, stderr) of a process that must succeed."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip(), error.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the libraries, made by four processes at once."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler in PATH")
    folder = tmp_path_factory.mktemp("cache")
    processes = [start(TELL, folder) for _ in range(4)]
    assert [finish(process) for process in processes] == 4 * [("None", "")]
    return folder


def libraries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "native").iterdir() if path.name != "lock")


def product_library(cache: Path) -> Path:
    """The one with the quantised product; the other is the team."""
    key = native._find_compiler(cpu_native._FLAGS).key(cpu_native._SOURCES)
    (path,) = (cache / "native").glob(f"{key}-*.so")
    return path


def test_first_use_by_four_processes_leaves_one_of_each_library(cache: Path) -> None:
    assert len(libraries(cache)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{24}-[0-9a-f]{24}\.so", p.name) for p in libraries(cache))
    assert (cache / "native").stat().st_mode & 0o077 == 0


def test_the_cached_library_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(path, path.stat().st_mtime_ns) for path in libraries(cache)]
    monkeypatch.setenv("SQUALL_CACHE", str(cache))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "_build", lambda *a: pytest.fail("compiled again"))
    cpu_native._load()
    assert [(path, path.stat().st_mtime_ns) for path in libraries(cache)] == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_library_is_built_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    good = product_library(cache)
    content = good.read_bytes()
    bad = tmp_path / "native" / good.name
    bad.parent.mkdir()
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    bad.write_bytes({"truncated": content[:-1000], "flipped": flipped, "empty": b""}[damage])
    monkeypatch.setenv("SQUALL_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(compiler: object, source: Path, folder: Path, key: str) -> Path:
        assert not bad.exists()
        built.append(Path(shutil.copy(good, folder)))
        return built[0]

    monkeypatch.setattr(native, "_build", build)
    library = cpu_native._load()
    assert library.squall_block_bytes(3) == 20
    assert libraries(tmp_path) == built


def test_changed_sources_and_compilers_have_other_names() -> None:
    one = native._Compiler(("cc",), ("-O3",), b"#define __VERSION__ 1")
    others = [
        native._Compiler(("gcc",), ("-O3",), b"#define __VERSION__ 1"),
        native._Compiler(("cc",), ("-O2",), b"#define __VERSION__ 1"),
        native._Compiler(("cc",), ("-O3",), b"#define __VERSION__ 2"),
    ]
    keys = {compiler.key(cpu_native._SOURCES) for compiler in (one, *others)}
    keys.add(one.key((Path(__file__),)))
    keys.add(one.key(cpu_native._SOURCES[:1]))  # a header is a source too
    assert len(keys) == 6


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_as_many_threads_as_torch_was_told(cache: Path) -> None:
    """They start once; a forked child starts its own."""
    out, error = finish(start(THREADS, cache))
    assert error == ""
    assert out.split() == ["0", "2", "0", "0"]


def test_products_of_several_threads_at_once(cache: Path) -> None:
    out, error = finish(start(CONCURRENT, cache))
    assert (out, error) == ("done", "")


def test_without_a_compiler_the_reference_answers(tmp_path: Path) -> None:
    out, error = finish(start(TELL, tmp_path, PATH=str(tmp_path)))
    assert out == "no C compiler: cc, gcc or clang is not in PATH; install one (gcc)"
    assert error == f"quantised models will be slow on this CPU: {out}"


def test_a_compiler_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "odd cc"
    monkeypatch.setenv("SQUALL_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", f"'{compiler}' --quick")
    with pytest.raises(native.Unavailable, match=r"\$CC names '.*odd cc', which is not in"):
        cpu_native._load()
    compiler.write_text("#!/bin/sh\necho note >&2\necho 'fatal error: broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(native.Unavailable) as caught:
        cpu_native._load()
    assert str(caught.value) == f"'{compiler}' --quick does not work: fatal error: broken"
    works_once = 'case "$*" in *-dM*) exit 0;; esac'
    compiler.write_text(f"#!/bin/sh\n{works_once}\necho 'x.c:1: error: no' >&2\nexit 1\n")
    with pytest.raises(native.Unavailable) as caught:
        cpu_native._load()
    assert str(caught.value) == f"'{compiler}' --quick cannot compile cpu_quant.c: x.c:1: error: no"
    assert libraries(tmp_path) == []


def test_a_folder_that_cannot_be_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is then built for this process alone."""
    (tmp_path / "native").write_text("in the way")
    monkeypatch.setenv("SQUALL_CACHE", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    good = product_library(cache)

    def build(compiler: object, source: Path, folder: Path, key: str) -> Path:
        return Path(shutil.copy(good, folder))

    monkeypatch.setattr(native, "_build", build)
    assert cpu_native._load().squall_block_bytes(3) == 20


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    """The operators built for the oldest machine of this kind: no AVX2, plain C."""
    found = native._find_compiler(cpu_native._FLAGS)
    flags = tuple(flag for flag in found.flags if "native" not in flag)
    assert len(flags) < len(found.flags)
    compiler = native._Compiler(found.command, flags, b"")
    folder = tmp_path_factory.mktemp("portable")
    path = native._build(compiler, cpu_native._SOURCES[0], folder, "portable")
    library = cpu_native._declare(ctypes.CDLL(str(path)))
    return cpu_native.operators(library, team())


@pytest.mark.parametrize("entry", QUANTISED, ids=lambda entry: entry.name)
def test_plain_c(portable: dict[str, Callable[..., Any]], entry: QuantFormat) -> None:
    matmul, rows = portable["quant_matmul"], portable["dequantize_rows"]
    source = torch.Generator().manual_seed(0)
    shape = (40, 3 * entry.block_bytes)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    weights = entry.dequantize(raw)
    got = rows(raw, torch.arange(40), entry.ggml_type, torch.float32)
    torch.testing.assert_close(got, weights, rtol=0, atol=0, equal_nan=True)
    raw &= 0x3F  # float16 scales below 2
    if entry.name == "MXFP4":
        raw[:, :: entry.block_bytes] += 64  # powers from 2^-64 to 2^-1
    weights = entry.dequantize(raw).double()
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(7, weights.shape[1], generator=source).mul(2**-10).to(dtype)
        expected = x.double() @ weights.t()
        y = matmul(x, raw, entry.ggml_type)
        assert y.dtype == dtype
        assert torch.equal(matmul(x[:1], raw, entry.ggml_type), y[:1])
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= limit, f"{dtype}: {error:.1e}"
