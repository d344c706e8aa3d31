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
from squall.kernels.attention.store_kv import store_kv_reference
from squall.kernels.native.build import load_library
from squall.kernels.op import override
from squall.kernels.rmsnorm import add_rms_norm_reference, rms_norm_reference
from squall.kernels.rope import apply_rope_reference

_SOURCES = (Path(__file__).with_name("cpu_ops.c"),)
_FLAGS = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_ADDRESS, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_threads = torch.get_num_threads
_f32 = torch.float32


def enable(parallel: int | None) -> "CpuOps":
    """Register the operators. Raises ``Unavailable``."""
    ops = CpuOps(load_library(_SOURCES, _FLAGS), parallel)
    table: dict[str, Callable[..., object]] = {
        "rms_norm": ops.rms_norm,
        "add_rms_norm": ops.add_rms_norm,
        "apply_rope": ops.apply_rope,
        "silu_mul": ops.silu_mul,
        "gelu_tanh_mul": ops.gelu_tanh_mul,
        "store_kv": ops.store_kv,
    }
    for name, function in table.items():
        override(name, "CPU", function)
    return ops


class CpuOps:
    """The loaded library; ``parallel`` is ``GOMP_parallel``'s address, None for one thread."""

    def __init__(self, library: ctypes.CDLL, parallel: int | None) -> None:
        self._parallel = parallel
        shape: list[Any] = [_ADDRESS, _INT]
        self._norm = library.squall_rms_norm
        self._norm.argtypes = [*shape, *[_ADDRESS] * 5, *[_SIZE] * 5, _FLOAT]
        self._rope = library.squall_rope
        self._rope.argtypes = [*shape, *[_ADDRESS] * 4, *[_SIZE] * 6]
        self._gated = library.squall_gated
        self._gated.argtypes = [*shape, _INT, _ADDRESS, _ADDRESS, _SIZE, _SIZE]
        self._store = library.squall_store_kv
        self._store.argtypes = [*[_ADDRESS] * 5, *[_SIZE] * 7]
        self._decode = library.squall_decode_attention
        self._decode.argtypes = [*shape, *[_ADDRESS] * 6, *[_SIZE] * 10, _FLOAT, _FLOAT]
        self._decode.restype = _INT

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dim = weight.shape[0]
        if x.dtype != _f32 or x.stride(-1) != 1 or not 2 <= x.ndim <= 3:
            return rms_norm_reference(x, weight, eps)
        out = x.new_empty(x.shape)
        inner = x.shape[1] if x.ndim == 3 else 1
        self._norm(
            self._parallel, _threads(), x.data_ptr(), None, weight.data_ptr(), out.data_ptr(),
            None, x.shape[0] * inner, inner, dim, x.stride(0), x.stride(-2), eps,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if x.dtype != _f32 or x.stride(-1) != 1 or not residual.is_contiguous():
            return add_rms_norm_reference(x, residual, weight, eps)
        out, total = torch.empty_like(residual), torch.empty_like(residual)
        rows, dim = x.shape
        self._norm(
            self._parallel, _threads(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), total.data_ptr(), rows, 1, dim, x.stride(0), 0, eps,
        )  # fmt: skip
        return out, total

    def apply_rope(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        dense = q.stride(-1) == k.stride(-1) == 1 and positions.is_contiguous()
        if q.dtype != _f32 or k.dtype != _f32 or not dense:
            return apply_rope_reference(q, k, positions, cos_sin)
        outs = q.new_empty(q.shape), k.new_empty(k.shape)
        for x, out in zip((q, k), outs, strict=True):
            tokens, heads, dim = x.shape
            self._rope(
                self._parallel, _threads(), x.data_ptr(), positions.data_ptr(),
                cos_sin.data_ptr(), out.data_ptr(), tokens, heads, dim, cos_sin.shape[1],
                x.stride(0), x.stride(1),
            )  # fmt: skip
        return outs

    def silu_mul(self, x: Tensor) -> Tensor:
        return silu_mul_reference(x) if _needs_reference(x) else self._act(x, 0)

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        return gelu_tanh_mul_reference(x) if _needs_reference(x) else self._act(x, 1)

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
    ) -> None:
        same = k.dtype == v.dtype == k_cache.dtype == v_cache.dtype == _f32
        if not (same and k.stride(-1) == v.stride(-1) == 1 and slots.is_contiguous()):
            store_kv_reference(k, v, k_cache, v_cache, slots)
            return
        tokens, heads, dim = k.shape
        self._store(
            k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            slots.data_ptr(), tokens, heads, dim, k.stride(0), k.stride(1), v.stride(0),
            v.stride(1),
        )  # fmt: skip

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
    ) -> Tensor:
        """``paged_attention`` for one query token a sequence, all tensors float32."""
        seqs, heads, dim = q.shape
        block_size, kv_heads = k_cache.shape[1:3]
        out = q.new_empty(q.shape)
        status = self._decode(
            self._parallel, _threads(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            block_tables.data_ptr(), context_lens.data_ptr(), out.data_ptr(), seqs, heads,
            kv_heads, dim, block_size, block_tables.stride(0), q.stride(0), q.stride(1), longest,
            window, scale, softcap,
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for attention scores of {longest} tokens")
        return out

    def _act(self, x: Tensor, gelu: int) -> Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        out = x.new_empty((rows, width))
        self._gated(self._parallel, _threads(), gelu, x.data_ptr(), out.data_ptr(), rows, width)
        return out


def _needs_reference(x: Tensor) -> bool:
    return x.dtype != _f32 or x.ndim != 2 or not x.is_contiguous()
