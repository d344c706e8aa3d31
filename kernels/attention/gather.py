"""The keys and values of one sequence, read from the paged cache into dense tensors.

``k_cache``, ``v_cache`` ``[blocks, block_size, KV, D]`` (dense; f32, f16, bf16 or float8_e4m3fn),
``table`` int32 ``[B]``, dense: the sequence's blocks in order, of which the first ``length`` slots
are read. Results: k and v ``[length, KV, D]`` of ``dtype`` (f32, f16, bf16), dense.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.attention.fp8 import read, value_as
from squall.kernels.cases import BF16, Case, random
from squall.kernels.lang import tl
from squall.kernels.launch import kernel
from squall.kernels.op import op


def gather_kv_reference(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    blocks = table[: -(-length // k_cache.shape[1])].long()
    k, v = (c.index_select(0, blocks).flatten(0, 1)[:length].to(dtype) for c in (k_cache, v_cache))
    return k, v


def _fake(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (length, *k_cache.shape[2:])
    k, v = (torch.empty(shape, dtype=dtype, device=k_cache.device) for _ in range(2))
    return k, v


@kernel(do_not_specialize=["length"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, table_ptr, length,
    BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the sequence, parts of a block's BLOCK_SIZE tokens of ROW elements). The mask
    goes by tokens, which leaves loads and stores as wide as rows allow."""
    BLOCK_ELEMENTS: tl.constexpr = BLOCK_SIZE * ROW
    place = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(table_ptr + place).to(tl.int64) * BLOCK_ELEMENTS + element
    target = place * BLOCK_ELEMENTS + element
    mask = (element // ROW < BLOCK_SIZE) & (place * BLOCK_SIZE + element // ROW < length)
    k = tl.load(k_cache_ptr + source, mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + source, mask=mask, other=0.0)
    tl.store(k_ptr + target, value_as(k, k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + target, value_as(v, v_ptr.dtype.element_ty), mask=mask)


def gather_kv_launcher(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    assert k_cache.shape == v_cache.shape, f"caches {k_cache.shape} and {v_cache.shape}"
    assert k_cache.is_contiguous(), "the caches must be dense"
    assert v_cache.is_contiguous(), "the caches must be dense"
    assert table.is_contiguous(), "the table must be dense"
    block_size, kv_heads, dim = k_cache.shape[1:]
    blocks = -(-length // block_size)
    assert blocks <= table.shape[0], f"{length} tokens in {table.shape[0]} blocks"
    k, v = _fake(k_cache, v_cache, table, length, dtype)
    if length == 0:
        return k, v
    row, block = kv_heads * dim, 4096
    _gather_kernel[(blocks, -(-block_size * row // block))](
        read(k_cache), read(v_cache), k, v, table, length, block_size, row, block, num_warps=4
    )
    return k, v


gather_kv = op(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor table, int length, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    gather_kv_reference,
    gather_kv_launcher,
    _fake,
)


def _case(
    length: int, shape: tuple[int, int, int], fp8: bool, aot: tuple[torch.dtype, ...]
) -> Case:
    """``shape`` is (block_size, heads, dim)."""

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        blocks = -(-length // shape[0]) + 2
        kept = torch.float8_e4m3fn if fp8 else dtype
        caches = [random((blocks, *shape), dtype, device, 61 + i).to(kept) for i in range(2)]
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(63))
        return *caches, order.int().to(device), length, dtype

    name = f"gather_kv-{length}-{shape[0]}x{shape[1]}x{shape[2]}{'-fp8' * fp8}"
    return Case(name, gather_kv, gather_kv_reference, gather_kv_launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case(70, (16, 3, 80), False, BF16)
    yield _case(64, (32, 8, 128), False, ())
    yield _case(45, (8, 1, 64), True, BF16)
    yield _case(0, (16, 2, 64), False, ())


CASES = tuple(_cases())
