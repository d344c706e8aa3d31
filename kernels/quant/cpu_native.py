"""Quantised matmul on the CPU in C, compiled at first use for this very machine.

``enable()`` builds ``cpu_quant.c`` with the user's C compiler ($CC, else cc, gcc or clang), keeps
the library under Squall's cache folder and lets it run ``squall::quant_matmul`` and
``squall::dequantize_rows`` on CPU tensors. Without a compiler the torch reference stays, which
gives the same results many times slower: ``enable()`` says so in one line, and logs it once.

The library is named after the SHA-256 of everything it was built from (sources, flags, the
compiler's predefined macros, which state its version and the CPU features it may use) and after
its own, so a damaged file is noticed before it is loaded. It uses no threads of its own but
those of torch's OpenMP runtime, as many as ``torch.get_num_threads()``.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from squall.kernels.cache import cache_dir
from squall.kernels.op import override
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.matmul import (
    check_columns,
    dequantize_rows_reference,
    quant_matmul_reference,
    row_weights,
)

_SOURCES = tuple(Path(__file__).with_name(n) for n in ("cpu_quant.c", "cpu_quant_formats.h"))
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
# The first that the compiler knows; without, it builds for the oldest machine of this kind.
_MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 120
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MEMORY, _NO_ROW = 1, 3
_LOCK = threading.Lock()
_log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """The library cannot be had; the message is one line."""


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    flags: tuple[str, ...]
    macros: bytes  # predefined with these flags

    def key(self) -> str:
        """Names everything that the library depends on."""
        parts = [source.read_bytes() for source in _SOURCES]
        parts += [repr((self.command, self.flags)).encode(), self.macros]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def enable() -> str | None:
    """Let the native library run the quantised operators on the CPU.

    None when it does, else the reason in one line (logged once as a warning). The first call of
    a process loads the library and compiles it when the cache has none (about 3 s); later calls
    and other threads get the same answer.
    """
    with _LOCK:
        return _enabled()


@functools.cache
def _enabled() -> str | None:
    try:
        library = _load()
    except (_Unavailable, OSError) as error:
        _log.warning("quantised models will be slow on this CPU: %s", error)
        return str(error)
    parallel = _torch_parallel()
    if parallel is None:
        _log.warning("quantised models use one thread: torch shares no OpenMP runtime here")
    override("quant_matmul", "CPU", _matmul(library, parallel))
    override("dequantize_rows", "CPU", _dequantize(library))
    return None


def _torch_parallel() -> int | None:
    """Address of ``GOMP_parallel`` as torch itself finds it; None where torch has no such thing.

    GCC's runtime, and LLVM's and Intel's in its place, export it. Libraries loaded for all come
    first, as for torch: a preloaded runtime wins.
    """
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu"
    for name in (None, f"{torch_cpu}.so", f"{torch_cpu}.dylib"):
        try:
            scope = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(scope.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


# --- building ---------------------------------------------------------------------------------


def _load() -> ctypes.CDLL:
    if sys.byteorder != "little":
        raise _Unavailable("the native library needs a little-endian machine")
    compiler = _find_compiler()
    folder, key = cache_dir() / "native", compiler.key()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            path = _cached(folder, key) or _build(compiler, folder, key)
        return _declare(ctypes.CDLL(str(path)))
    except OSError as error:
        _log.info("cannot keep the native library: %s", error)
    with tempfile.TemporaryDirectory(prefix="squall-") as temporary:  # loaded, it may go
        try:
            return _declare(ctypes.CDLL(str(_build(compiler, Path(temporary), key))))
        except OSError as error:
            raise _Unavailable(f"cannot load the compiled library: {error}") from None


def _find_compiler() -> _Compiler:
    chosen = shlex.split(os.environ.get("CC", ""))
    names = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    command = next((c for c in names if shutil.which(c[0])), None)
    if command is None:
        missing = f"$CC names {chosen[0]!r}, which" if chosen else "cc, gcc or clang"
        raise _Unavailable(f"no C compiler: {missing} is not in PATH; install one (gcc)")
    for machine in _MACHINE_FLAGS:
        flags = (*_FLAGS, *machine)
        result = _run([*command, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if result.returncode == 0:
            return _Compiler(tuple(command), flags, result.stdout)
    raise _Unavailable(f"{shlex.join(command)} does not work: {_reason(result.stderr)}")


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


def _build(compiler: _Compiler, folder: Path, key: str) -> Path:
    """Compile into ``folder``."""
    handle, name = tempfile.mkstemp(prefix=f"{key}.", suffix=".part", dir=folder)
    os.close(handle)
    part = Path(name)
    try:
        command = [*compiler.command, *compiler.flags, "-shared", "-o", name, str(_SOURCES[0])]
        result = _run(command)
        if result.returncode:
            raise _Unavailable(
                f"{shlex.join(compiler.command)} cannot compile {_SOURCES[0].name}: "
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
        raise _Unavailable(f"{command[0]} does not work: {error}") from None


def _reason(stderr: bytes) -> str:
    """The first line of a compiler's output that tells an error."""
    lines = stderr.decode(errors="replace").splitlines() or ["it gave no reason"]
    return next((line for line in lines if "error" in line), lines[0]).strip()


# --- calling ----------------------------------------------------------------------------------


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """State the C functions' arguments, once: ctypes converts plain ints fastest."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.squall_block_bytes.argtypes = [number]
    library.squall_quant_matmul.argtypes = [
        address, number, address, number, address, size, address, size, size, size, number,
    ]  # fmt: skip
    library.squall_dequantize.argtypes = [
        number, address, size, size, address, size, size, address, number,
    ]  # fmt: skip
    return library


def _row_sizes(library: ctypes.CDLL) -> dict[int, tuple[int, int]]:
    """GGML type code -> (weights, bytes) of a block, of the formats that the library knows."""
    return {
        code: (entry.block_size, entry.block_bytes)
        for code, entry in gguf_formats().items()
        if library.squall_block_bytes(code) == entry.block_bytes
    }


def _matmul(library: ctypes.CDLL, parallel: int | None) -> Callable[[Tensor, Tensor, int], Tensor]:
    # Locals: a call must cost little beside the microseconds of a small product.
    run, sizes, floats, no_memory = (
        library.squall_quant_matmul, _row_sizes(library), _FLOATS, _NO_MEMORY,
    )  # fmt: skip
    get_num_threads = torch.get_num_threads

    def quant_matmul(x: Tensor, raw: Tensor, ggml_type: int) -> Tensor:
        """``squall.kernels.quant.matmul`` on the CPU."""
        size, dtype = sizes.get(ggml_type), floats.get(x.dtype)
        if size is None or dtype is None or not x.numel():
            return quant_matmul_reference(x, raw, ggml_type)  # only it has this format or dtype
        (*leading, k), (n, stride) = x.shape, raw.shape
        if k * size[1] != stride * size[0] or raw.dtype != torch.uint8:
            check_columns(x, raw, ggml_type)
        x = x.contiguous()
        if not raw.is_contiguous():
            raw = raw if raw.stride(1) == 1 else raw.contiguous()
            stride = raw.stride(0)
        y = x.new_empty((*leading, n))
        status = run(
            parallel, ggml_type, x.data_ptr(), dtype, raw.data_ptr(), stride, y.data_ptr(),
            x.numel() // k, n, k, get_num_threads(),
        )  # fmt: skip
        if status == no_memory:
            raise MemoryError(f"no memory for {x.numel()} rounded activations")
        return y

    return quant_matmul


def _dequantize(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, int, torch.dtype], Tensor]:
    run, sizes = library.squall_dequantize, _row_sizes(library)

    def dequantize_rows(raw: Tensor, rows: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
        """``squall.kernels.quant.matmul`` on the CPU."""
        if ggml_type not in sizes or dtype not in _FLOATS or rows.dtype != torch.int64:
            return dequantize_rows_reference(raw, rows, ggml_type, dtype)
        k, rows = row_weights(raw, ggml_type), rows.contiguous()
        if raw.shape[1] and raw.stride(1) != 1:
            raw = raw.contiguous()
        out = torch.empty((rows.shape[0], k), dtype=dtype)
        status = run(
            ggml_type, raw.data_ptr(), raw.stride(0), raw.shape[0], rows.data_ptr(), len(rows), k,
            out.data_ptr(), _FLOATS[dtype],
        )  # fmt: skip
        if status == _NO_ROW:
            low, high = int(rows.min()), int(rows.max())
            raise IndexError(f"rows {low} to {high} of {raw.shape[0]}")
        return out

    return dequantize_rows
