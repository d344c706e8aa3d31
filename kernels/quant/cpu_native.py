"""Quantised matmul on the CPU in C, compiled at first use for this very machine.

``enable()`` builds ``cpu_quant.c`` (:mod:`squall.kernels.native.build` says how and where) and
lets it run the operators of :mod:`squall.kernels.quant.matmul` on CPU tensors. Without a compiler
the torch references stay, which give the same results many times slower: ``enable()`` says so in
one line, and logs it once. As many threads work as ``torch.get_num_threads()`` says.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.native.build import Unavailable, load_library
from squall.kernels.native.team import team
from squall.kernels.op import override
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.matmul import (
    check_columns,
    check_matmul_add,
    check_norm_matmul,
    dequantize_rows_reference,
    quant_matmul_add_reference,
    quant_matmul_reference,
    quant_norm_matmul_reference,
    row_weights,
)

_FOLDER, _NATIVE = Path(__file__).parent, Path(native.__file__).parent
_SOURCES = (
    *(_FOLDER / name for name in ("cpu_quant.c", "cpu_quant_formats.h", "cpu_quant_rows.h")),
    *(_NATIVE / name for name in ("cpu_math.h", "team.h")),
)
_FLAGS = ("-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math")
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EPILOGUES = {"none": 0, "silu": 1, "gelu_tanh": 2}
_ADD = 3
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
        library, threads = _load(), team()
    except (Unavailable, OSError) as error:
        _log.warning("quantised models will be slow on this CPU: %s", error)
        return str(error)
    for name, function in operators(library, threads).items():
        override(name, "CPU", function)
    return None


def _load() -> ctypes.CDLL:
    return _declare(load_library(_SOURCES, _FLAGS))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """State the C functions' arguments, once: ctypes converts plain ints fastest."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.squall_block_bytes.argtypes = [number]
    library.squall_quant_matmul.argtypes = [
        address, number, number, address, size, size, size, size, address, number, address,
        ctypes.c_float, number, address, number, number,
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


def operators(library: ctypes.CDLL, run: int) -> dict[str, Callable[..., Any]]:
    """The operators by name; ``run`` is the address of ``squall_team_run``."""
    return {
        "quant_matmul": _matmul(library, run),
        "quant_norm_matmul": _norm_matmul(library, run),
        "quant_matmul_add": _matmul_add(library, run),
        "dequantize_rows": _dequantize(library),
    }


# Locals below: a call must cost little beside the microseconds of a small product.


def _matmul(library: ctypes.CDLL, run: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    product, sizes, floats = library.squall_quant_matmul, _row_sizes(library), _FLOATS
    get_num_threads = torch.get_num_threads

    def quant_matmul(x: Tensor, raw: Tensor, ggml_type: int) -> Tensor:
        size, dtype = sizes.get(ggml_type), floats.get(x.dtype)
        if size is None or dtype is None or not x.numel():
            return quant_matmul_reference(x, raw, ggml_type)  # only it has this format or dtype
        (*leading, k), n = x.shape, raw.shape[0]
        if k * size[1] != raw.shape[1] * size[0] or raw.dtype != torch.uint8:
            check_columns(x, raw, ggml_type)
        x, raw = x.contiguous(), _dense_rows(raw)
        y = x.new_empty((*leading, n))
        status = product(
            run, get_num_threads(), ggml_type, raw.data_ptr(), raw.stride(0), x.numel() // k, n, k,
            x.data_ptr(), dtype, None, 0.0, 0, y.data_ptr(), dtype, 0,
        )  # fmt: skip
        _check(status, x)
        return y

    return quant_matmul


def _norm_matmul(library: ctypes.CDLL, run: int) -> Callable[..., Tensor]:
    product, sizes, floats = library.squall_quant_matmul, _row_sizes(library), _FLOATS
    get_num_threads, epilogues = torch.get_num_threads, _EPILOGUES
    f32, u8 = torch.float32, torch.uint8

    def quant_norm_matmul(
        stream: Tensor,
        norm: Tensor,
        eps: float,
        raw: Tensor,
        ggml_type: int,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        size, code, epilogue = sizes.get(ggml_type), floats.get(dtype), epilogues.get(activation)
        if size is None or code is None or epilogue is None or not stream.numel():
            return quant_norm_matmul_reference(stream, norm, eps, raw, ggml_type, activation, dtype)
        m, k = stream.shape
        n, row_bytes = raw.shape
        if k * size[1] != row_bytes * size[0] or n & 1 or raw.dtype != u8:
            check_norm_matmul(stream, norm, raw, ggml_type, activation)
        if stream.dtype != f32 or norm.dtype != f32 or norm.shape != (k,):
            check_norm_matmul(stream, norm, raw, ggml_type, activation)
        stream, norm, raw = stream.contiguous(), norm.contiguous(), _dense_rows(raw)
        y = torch.empty((m, n // 2 if epilogue else n), dtype=dtype)
        status = product(
            run, get_num_threads(), ggml_type, raw.data_ptr(), raw.stride(0), m, n, k,
            stream.data_ptr(), 0, norm.data_ptr(), eps, code, y.data_ptr(), code, epilogue,
        )  # fmt: skip
        _check(status, stream)
        return y

    return quant_norm_matmul


def _matmul_add(library: ctypes.CDLL, run: int) -> Callable[[Tensor, Tensor, int, Tensor], None]:
    product, sizes, floats = library.squall_quant_matmul, _row_sizes(library), _FLOATS
    get_num_threads, f32, u8 = torch.get_num_threads, torch.float32, torch.uint8

    def quant_matmul_add(x: Tensor, raw: Tensor, ggml_type: int, stream: Tensor) -> None:
        size, dtype, count = sizes.get(ggml_type), floats.get(x.dtype), x.numel()
        if size is None or dtype is None or not count:
            return quant_matmul_add_reference(x, raw, ggml_type, stream)
        (*leading, k), (n, row_bytes) = x.shape, raw.shape
        if k * size[1] != row_bytes * size[0] or stream.shape != (*leading, n):
            check_matmul_add(x, raw, ggml_type, stream)
        if stream.dtype != f32 or not stream.is_contiguous() or raw.dtype != u8:
            check_matmul_add(x, raw, ggml_type, stream)
        x, raw = x.contiguous(), _dense_rows(raw)
        status = product(
            run, get_num_threads(), ggml_type, raw.data_ptr(), raw.stride(0), count // k, n, k,
            x.data_ptr(), dtype, None, 0.0, 0, stream.data_ptr(), 0, _ADD,
        )  # fmt: skip
        return _check(status, x)

    return quant_matmul_add


def _dense_rows(raw: Tensor) -> Tensor:
    """``raw``, or a copy where the bytes of a row are not side by side."""
    return raw if raw.stride(1) == 1 else raw.contiguous()


def _check(status: int, x: Tensor) -> None:
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for {x.numel()} rounded activations")


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
