"""Operators of a decoder block on the CPU, in C (``cpu_ops.c``), for float32.

``enable()`` puts them in place of the torch references for CPU tensors; other dtypes, and cases
the C code does not take, still go to the reference.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squall.kernels.activation import gelu_tanh_mul_reference, silu_mul_reference
from squall.kernels.attention.rope_store import rope_store_kv_reference
from squall.kernels.native.build import load_library
from squall.kernels.native.team import team
from squall.kernels.op import override
from squall.kernels.rmsnorm import rms_norm_add_reference, rms_norm_reference

_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / name for name in ("cpu_ops.c", "cpu_attention.h", "cpu_math.h", "team.h")
)
_FLAGS = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_ADDRESS, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_threads = torch.get_num_threads
_f32, _i64 = torch.float32, torch.int64


def enable() -> "CpuOps":
    """Register the operators. Raises ``Unavailable``."""
    ops = CpuOps(load_library(_SOURCES, _FLAGS), team())
    table: dict[str, Callable[..., object]] = {
        "rms_norm": ops.rms_norm,
        "rms_norm_add": ops.rms_norm_add,
        "silu_mul": ops.silu_mul,
        "gelu_tanh_mul": ops.gelu_tanh_mul,
        "rope_store_kv": ops.rope_store_kv,
    }
    for name, function in table.items():
        override(name, "CPU", function)
    return ops


class CpuOps:
    """The loaded library; ``run`` is the address of ``squall_team_run``."""

    def __init__(self, library: ctypes.CDLL, run: int) -> None:
        self._run = run
        shape: list[Any] = [_ADDRESS, _INT]
        self._norm = library.squall_rms_norm
        self._norm.argtypes = [*shape, *[_ADDRESS] * 3, *[_SIZE] * 3, _FLOAT, _INT]
        self._gated = library.squall_gated
        self._gated.argtypes = [*shape, _INT, _ADDRESS, _ADDRESS, _SIZE, _SIZE]
        self._rope_store = library.squall_rope_store
        self._rope_store.argtypes = [
            *shape, *[_ADDRESS] * 3, _FLOAT, _ADDRESS, _INT, *[_ADDRESS] * 4, _INT, _ADDRESS,
            *[_SIZE] * 6,
        ]  # fmt: skip
        self._decode = library.squall_decode_attention
        self._decode.argtypes = [*shape, *[_ADDRESS] * 7, *[_SIZE] * 10, _FLOAT, _FLOAT]
        self._decode.restype = _INT

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if x.dtype != _f32 or dtype != _f32 or x.stride(-1) != 1:
            return rms_norm_reference(x, weight, eps, dtype)
        y = torch.empty(x.shape, dtype=_f32)
        self._normed(x, weight, eps, y, 0)
        return y

    def rms_norm_add(self, x: Tensor, weight: Tensor, eps: float, stream: Tensor) -> None:
        if x.dtype != _f32 or x.stride(-1) != 1 or not stream.is_contiguous():
            rms_norm_add_reference(x, weight, eps, stream)
        else:
            self._normed(x, weight, eps, stream, 1)

    def silu_mul(self, x: Tensor) -> Tensor:
        return silu_mul_reference(x) if _needs_reference(x) else self._act(x, 0)

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        return gelu_tanh_mul_reference(x) if _needs_reference(x) else self._act(x, 1)

    def rope_store_kv(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        same = qkv.dtype == k_cache.dtype == v_cache.dtype == _f32
        if not same or qkv.stride(1) != 1:
            return rope_store_kv_reference(
                qkv, q_norm, k_norm, eps, positions, cos_sin, k_cache, v_cache, slots
            )
        tokens, width = qkv.shape
        _, _, kv_heads, dim = k_cache.shape
        heads = width // dim - 2 * kv_heads
        assert k_cache.is_contiguous(), "the caches must be dense"
        assert v_cache.is_contiguous(), "the caches must be dense"
        positions, slots = positions.contiguous(), slots.contiguous()
        q = torch.empty((tokens, heads, dim), dtype=_f32)
        self._rope_store(
            self._run, _threads(), qkv.data_ptr(), None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(), eps, positions.data_ptr(),
            positions.dtype == _i64, cos_sin.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            slots.data_ptr(), slots.dtype == _i64, q.data_ptr(), tokens, heads, kv_heads, dim,
            cos_sin.shape[1], qkv.stride(0),
        )  # fmt: skip
        return q

    def decode_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        longest: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """``paged_attention`` for one query token a sequence, all tensors float32."""
        seqs, heads, dim = q.shape
        block_size, kv_heads = k_cache.shape[1:3]
        out = torch.empty(q.shape, dtype=_f32)
        status = self._decode(
            self._run, _threads(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            block_tables.data_ptr(), context_lens.data_ptr(),
            None if sinks is None else sinks.data_ptr(), out.data_ptr(), seqs, heads, kv_heads,
            dim, block_size, block_tables.stride(0), q.stride(0), q.stride(1), longest, window,
            scale, softcap,
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for attention scores of {longest} tokens")
        return out

    def _normed(self, x: Tensor, weight: Tensor, eps: float, y: Tensor, add: int) -> None:
        rows, dim = x.shape
        self._norm(
            self._run, _threads(), x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, dim,
            x.stride(0), eps, add,
        )  # fmt: skip

    def _act(self, x: Tensor, gelu: int) -> Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        out = x.new_empty((rows, width))
        self._gated(self._run, _threads(), gelu, x.data_ptr(), out.data_ptr(), rows, width)
        return out


def _needs_reference(x: Tensor) -> bool:
    return x.dtype != _f32 or x.ndim != 2 or not x.is_contiguous()
