"""Quantised matmul on the CPU in C, compiled at first use for this very machine.

``enable()`` builds ``cpu_quant.c`` (:mod:`squall.kernels.native.build` says how and where) and
lets it run ``squall::quant_matmul`` and ``squall::dequantize_rows`` on CPU tensors. Without a
compiler the torch reference stays, which gives the same results many times slower: ``enable()``
says so in one line, and logs it once. The library has no threads of its own, it uses those of
torch's OpenMP runtime, as many as ``torch.get_num_threads()``.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from squall.kernels.native.build import Unavailable, load_library, torch_parallel
from squall.kernels.op import override
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.matmul import (
    check_columns,
    dequantize_rows_reference,
    quant_matmul_reference,
    row_weights,
)

_FILES = ("cpu_quant.c", "cpu_quant_formats.h", "cpu_quant_single.h")
_SOURCES = tuple(Path(__file__).with_name(n) for n in _FILES)
_FLAGS = ("-ffp-contract=off", "-fno-strict-aliasing")
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MEMORY, _NO_ROW = 1, 3
_LOCK = threading.Lock()
_log = logging.getLogger(__name__)


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
    except (Unavailable, OSError) as error:
        _log.warning("quantised models will be slow on this CPU: %s", error)
        return str(error)
    parallel = torch_parallel()
    if parallel is None:
        _log.warning("quantised models use one thread: torch shares no OpenMP runtime here")
    override("quant_matmul", "CPU", _matmul(library, parallel))
    override("dequantize_rows", "CPU", _dequantize(library))
    return None


def _load() -> ctypes.CDLL:
    return _declare(load_library(_SOURCES, _FLAGS))


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
