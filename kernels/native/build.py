"""Small C libraries, compiled at first use for this very machine.

A library is built with the user's C compiler ($CC, else cc, gcc or clang) and kept under Squall's
cache folder. It is named after the SHA-256 of everything it was built from (sources, flags, the
compiler's predefined macros, which state its version and the CPU features it may use) and after
its own, so a damaged file is noticed before it is loaded.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from squall.kernels.cache import cache_dir

_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-w")
# The first that the compiler knows; without, it builds for the oldest machine of this kind.
_MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 120
_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """A library cannot be had; the message is one line."""


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    flags: tuple[str, ...]
    macros: bytes  # predefined with these flags

    def key(self, sources: tuple[Path, ...]) -> str:
        """Names everything that a library of ``sources`` depends on."""
        parts = [source.read_bytes() for source in sources]
        parts += [repr((self.command, self.flags)).encode(), self.macros]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def load_library(sources: tuple[Path, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of ``sources`` (the first is compiled, it includes the others).

    Raises Unavailable when it cannot be compiled or loaded.
    """
    if sys.byteorder != "little":
        raise Unavailable("the native library needs a little-endian machine")
    compiler = _find_compiler(flags)
    folder, key = cache_dir() / "native", compiler.key(sources)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            path = _cached(folder, key) or _build(compiler, sources[0], folder, key)
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.info("cannot keep the native library: %s", error)
    with tempfile.TemporaryDirectory(prefix="squall-") as temporary:  # loaded, it may go
        try:
            return ctypes.CDLL(str(_build(compiler, sources[0], Path(temporary), key)))
        except OSError as error:
            raise Unavailable(f"cannot load the compiled library: {error}") from None


def _find_compiler(extra: tuple[str, ...]) -> _Compiler:
    chosen = shlex.split(os.environ.get("CC", ""))
    names = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    command = next((c for c in names if shutil.which(c[0])), None)
    if command is None:
        missing = f"$CC names {chosen[0]!r}, which" if chosen else "cc, gcc or clang"
        raise Unavailable(f"no C compiler: {missing} is not in PATH; install one (gcc)")
    for machine in _MACHINE_FLAGS:
        flags = (*_FLAGS, *extra, *machine)
        result = _run([*command, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if result.returncode == 0:
            return _Compiler(tuple(command), flags, result.stdout)
    raise Unavailable(f"{shlex.join(command)} does not work: {_reason(result.stderr)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, so that of several that start together one compiles.

    A file system without locks only costs that: files are complete before they get their name.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.info("cannot lock %s: %s", folder, error)
        yield


def _cached(folder: Path, key: str) -> Path | None:
    """The library built from ``key``, whole and the user's own; what is not goes."""
    for path in folder.glob(f"{key}-*.so"):
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name == f"{key}-{digest[:24]}.so" and path.stat().st_uid in (0, os.geteuid()):
                return path
            path.unlink()
        except OSError as error:
            _log.info("cannot use %s: %s", path, error)
    return None


def _build(compiler: _Compiler, source: Path, folder: Path, key: str) -> Path:
    """Compile into ``folder``."""
    handle, name = tempfile.mkstemp(prefix=f"{key}.", suffix=".part", dir=folder)
    os.close(handle)
    part = Path(name)
    try:
        command = [*compiler.command, *compiler.flags, "-shared", "-o", name, str(source), "-lm"]
        result = _run(command)
        if result.returncode:
            raise Unavailable(
                f"{shlex.join(compiler.command)} cannot compile {source.name}: "
                f"{_reason(result.stderr)}"
            )
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        return part.replace(folder / f"{key}-{digest[:24]}.so")
    finally:
        part.unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, timeout=_COMPILE_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not work: {error}") from None


def _reason(stderr: bytes) -> str:
    """The first line of a compiler's output that tells an error."""
    lines = stderr.decode(errors="replace").splitlines() or ["it gave no reason"]
    return next((line for line in lines if "error" in line), lines[0]).strip()
