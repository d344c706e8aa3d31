"""Write one step's keys and values into the paged cache.

``k``, ``v`` ``[T, KV, D]`` (f32, f16, bf16; tokens and heads may be strided, the last dimension
is dense) go to ``k_cache``, ``v_cache`` ``[blocks, block_size, KV, D]`` (dense, of any float
dtype: values are rounded to it). Token t lands in slot ``slots[t]`` (int64, block * block_size +
offset); a negative slot stores nothing. No two tokens of a call may share a slot.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.cases import BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.op import op


def store_kv_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    if slots.numel() == 0:
        return
    if min(slots.tolist()) < 0:
        kept = (slots >= 0).nonzero().squeeze(1)
        k, v, slots = k.index_select(0, kept), v.index_select(0, kept), slots.index_select(0, kept)
    for new, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.view(-1, *cache.shape[2:])
        flat.index_copy_(0, slots, new if new.dtype == cache.dtype else new.to(cache.dtype))


def _fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


@triton.jit
def _store_kv_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tokens, blocks of a token's HEADS * DIM elements)."""
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    mask = (element < HEADS * DIM) & (slot >= 0)
    head, d = element // DIM, element % DIM
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + d, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + d, mask=mask)
    target = slot * (HEADS * DIM) + element
    tl.store(k_cache_ptr + target, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + target, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def store_kv_launcher(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    tokens, heads, dim = k.shape
    assert v.shape == k.shape, f"k {k.shape}, v {v.shape}"
    for cache in (k_cache, v_cache):
        assert cache.shape[2:] == (heads, dim), f"{k.shape} into {cache.shape}"
        assert cache.is_contiguous(), "the caches must be dense"
    assert slots.is_contiguous(), "slots must be dense"
    assert k.stride(2) == v.stride(2) == 1, "heads must be dense"
    if tokens == 0:
        return
    block = min(1024, next_power_of_2(heads * dim))
    _store_kv_kernel[(tokens, -(-heads * dim // block))](
        k, v, k_cache, v_cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        heads, dim, block, num_warps=4,
    )  # fmt: skip


store_kv = op(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    store_kv_reference,
    store_kv_launcher,
    _fake,
)

StoreArgs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _case(
    tokens: int, shape: tuple[int, int, int], cache_dtype: torch.dtype | None, skip: bool
) -> Case:
    """``shape`` is (block_size, heads, dim); the caches start as NaN."""
    block_size, heads, dim = shape

    def build(dtype: torch.dtype, device: torch.device) -> StoreArgs:
        qkv = random((tokens, 3 * heads, dim), dtype, device, 31)
        blocks = -(-tokens // block_size) + 3
        order = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(32))
        slots = order[:tokens].clone()
        if skip:
            slots[::3] = -1
        caches = [
            torch.full(
                (blocks, block_size, heads, dim),
                float("nan"),
                dtype=cache_dtype or dtype,
                device=device,
            )
            for _ in range(2)
        ]
        return qkv[:, heads : 2 * heads], qkv[:, 2 * heads :], *caches, slots.to(device)  # type: ignore[return-value]

    kind = f"-{str(cache_dtype).removeprefix('torch.')}" if cache_dtype else ""
    name = f"store_kv-{tokens}-{block_size}x{heads}x{dim}{kind}{'-skip' if skip else ''}"
    fn, reference, launcher = store_kv, store_kv_reference, store_kv_launcher
    aot, interpret = BOTH * (tokens in (1, 7)), tokens < 100
    return Case(name, fn, reference, launcher, build, (2, 3), interpret, aot)


def _cases() -> Iterator[Case]:
    yield _case(1, (32, 3, 64), None, skip=False)
    yield _case(0, (16, 2, 64), None, skip=False)
    yield _case(63, (8, 1, 80), None, skip=True)
    yield _case(1000, (64, 2, 16), None, skip=True)
    yield _case(7, (16, 8, 256), torch.float16, skip=False)
    yield _case(5, (32, 2, 96), torch.float32, skip=True)


CASES = tuple(_cases())
