"""Latent attention (MLA), what comes before it: the latent into the cache, the queries turned.

DeepSeek-V2 (arXiv:2405.04434, section 2.1). ``q`` ``[T, H, Dn + R]`` (f32, f16, bf16; tokens and
heads may be strided) are query heads, of which the last R elements are rotated; ``latent``
``[T, L + R]`` of the same dtype (rows may be strided) are a token's latent and the part of its keys
that is rotated and shared by all heads. ``cache`` ``[blocks, block_size, 1, L + R]``, dense, of the
same dtype; ``norm`` float32 ``[L]``; ``positions``, ``cos_sin`` float32 ``[P, R]`` and ``slots`` as
in ``squall.kernels.attention.rope_store``, as is the rotation.

    cache[slots[t]] = (latent[:L] / sqrt(mean(latent[:L]^2) + eps) * norm, rotated latent[L:])

Result, of the dtype of ``q``, dense: without ``kv_b`` the rotated parts of the queries,
``[T, H, R]``. ``kv_b`` ``[H, Dn + Dv, L]`` (dense; the first Dn rows W of a head make its keys of a
latent c) is moved over to the queries, ``q_n (W c) = (q_n W) c`` ("absorbed"): ``[T, H, L + R]``
with ``q[:Dn] kv_b[h, :Dn]`` before the rotated part, which a decode step multiplies with the cache
as it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.rope_store import rotary_table, store, turned
from squall.kernels.attention.tile import MAX_HEAD_DIM, dot_precision, padded_dim
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import let_next_come, next_power_of_2, tl, triton, wait_for_last
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, multiprocessors, op

MAX_LATENT = 4096  # elements of a latent, which one program norms


def absorbed(q: Tensor, q_pe: Tensor, kv_b: Tensor) -> Tensor:
    """Queries ``[T, H, L + R]`` for latents, of the parts ``[T, H, Dn]`` and ``[T, H, R]``."""
    return torch.cat((torch.einsum("thd,hdl->thl", q, kv_b[:, : q.shape[2]]), q_pe), -1)


def mla_query_reference(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_b: Tensor | None,
) -> Tensor:
    size, plain = norm.shape[0], q.shape[2] - cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    normed = F.rms_norm(latent[:, :size].float(), norm.shape, norm, eps)
    key = turned(latent[:, None, size:], None, eps, cos, sin)
    store(torch.cat((normed.unsqueeze(1), key), -1), cache, slots)
    rotated = turned(q[..., plain:], None, eps, cos, sin).to(q.dtype)
    return rotated if kv_b is None else absorbed(q[..., :plain], rotated, kv_b)


def _fake(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_b: Tensor | None,
) -> Tensor:
    width = cos_sin.shape[1] if kv_b is None else cache.shape[3]
    return torch.empty((*q.shape[:2], width), dtype=q.dtype, device=q.device)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, angles_ptr, there, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Rotate rows of 2 HALF elements; the pointers are ``[N, 1]``, to their beginnings and to those
    of their rows of the table; ``there`` ``[N, 1]``."""
    d = tl.arange(0, BLOCK_HALF)[None, :]
    mask = there & (d < HALF)
    cos = tl.load(angles_ptr + d, mask=mask, other=0.0)
    sin = tl.load(angles_ptr + HALF + d, mask=mask, other=0.0)
    a = tl.load(x_ptr + d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + d, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + HALF + d, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep_latent(  # type: ignore[no-untyped-def]
    latent_ptr, norm_ptr, positions_ptr, angles_ptr, cache_ptr, slots_ptr, token, latent_stride,
    eps, HALF: tl.constexpr, LATENT: tl.constexpr, BLOCK_LATENT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rotate what ``token`` puts into the cache."""
    token = token.to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    row_ptr = latent_ptr + token * latent_stride
    target_ptr = cache_ptr + slot * (LATENT + 2 * HALF)
    d = tl.arange(0, BLOCK_LATENT)
    x = tl.load(row_ptr + d, mask=d < LATENT, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + d, mask=d < LATENT, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps) * weight
    kept = slot >= 0
    tl.store(target_ptr + d, y.to(cache_ptr.dtype.element_ty), mask=(d < LATENT) & kept)
    one = tl.zeros([1, 1], dtype=tl.int64)
    _turn(
        row_ptr + LATENT + one, target_ptr + LATENT + one, angles_ptr + position * (2 * HALF) + one,
        kept, HALF, BLOCK_HALF,
    )  # fmt: skip


@kernel(do_not_specialize=["tokens"])
def _mla_query_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    latent_ptr,
    norm_ptr,
    positions_ptr,
    angles_ptr,
    cache_ptr,
    slots_ptr,
    kv_b_ptr,
    out_ptr,
    tokens,
    q_token_stride,
    q_head_stride,
    latent_stride,
    kv_b_head_stride,
    eps,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    HALF: tl.constexpr,
    LATENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMN: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of ROWS tokens * HEADS * (COLUMNS + 1) + tokens,): of a head of some tokens, one
    of the COLUMNS blocks of the absorbed part, or the rotated part; then the latents, by token."""
    let_next_come(PDL)
    kinds: tl.constexpr = COLUMNS + 1
    programs = (tokens + ROWS - 1) // ROWS * (HEADS * kinds)
    program = tl.program_id(0)
    if program >= programs:
        wait_for_last(PDL)
        _keep_latent(
            latent_ptr, norm_ptr, positions_ptr, angles_ptr, cache_ptr, slots_ptr,
            program - programs, latent_stride, eps, HALF, LATENT, BLOCK_LATENT, BLOCK_HALF,
        )  # fmt: skip
        return
    column = program % kinds
    head = (program // kinds % HEADS).to(tl.int64)
    token = program // (HEADS * kinds) * ROWS + tl.arange(0, ROWS)
    there = (token < tokens)[:, None]
    place = token.to(tl.int64)[:, None]
    WIDTH: tl.constexpr = (LATENT if COLUMNS > 0 else 0) + 2 * HALF
    row_ptr = q_ptr + place * q_token_stride + head * q_head_stride
    target_ptr = out_ptr + (place * HEADS + head) * WIDTH
    if column == COLUMNS:
        position = tl.load(positions_ptr + token, mask=token < tokens, other=0).to(tl.int64)
        wait_for_last(PDL)
        _turn(
            row_ptr + PLAIN, target_ptr + (WIDTH - 2 * HALF),
            angles_ptr + position[:, None] * (2 * HALF), there, HALF, BLOCK_HALF,
        )  # fmt: skip
    else:
        d = tl.arange(0, BLOCK_PLAIN)
        c = column * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
        w_ptr = kv_b_ptr + head * kv_b_head_stride + d[:, None] * LATENT + c[None, :]
        w = tl.load(w_ptr, mask=(d < PLAIN)[:, None] & (c < LATENT)[None, :], other=0.0)
        wait_for_last(PDL)
        x = tl.load(row_ptr + d[None, :], mask=there & (d < PLAIN)[None, :], other=0.0)
        y = tl.dot(x, w, input_precision=PRECISION)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(target_ptr + c[None, :], y, mask=there & (c < LATENT)[None, :])


def _check(
    q: Tensor, latent: Tensor, norm: Tensor, cos_sin: Tensor, cache: Tensor, kv_b: Tensor | None
) -> None:
    """What the kernel takes for granted."""
    size, rotary = norm.shape[0], cos_sin.shape[1]
    assert size <= MAX_LATENT, f"latents of {size} elements; {MAX_LATENT} are supported"
    assert 0 < rotary < q.shape[2] <= MAX_HEAD_DIM + rotary, f"q {q.shape}, rotated {rotary}"
    assert rotary % 2 == 0, f"{rotary} rotary dimensions"
    assert latent.shape == (q.shape[0], size + rotary), f"q {q.shape}, latents {latent.shape}"
    assert cache.shape[2:] == (1, size + rotary), f"cache {cache.shape}, latents {latent.shape}"
    assert q.stride(2) == latent.stride(1) == 1, "heads and latents must be dense"
    assert q.dtype == latent.dtype == cache.dtype, f"{q.dtype}, {latent.dtype}, {cache.dtype}"
    for tensor in (norm, cos_sin, cache):
        assert tensor.is_contiguous(), "norm, cos_sin and cache must be dense"
    if kv_b is not None:
        shape = q.shape[1], q.shape[2] - rotary
        assert kv_b.shape[0] == shape[0], f"q {q.shape}, kv_b {kv_b.shape}"
        assert kv_b.shape[1] > shape[1], f"q {q.shape}, kv_b {kv_b.shape}"
        assert kv_b.shape[2] == size, f"kv_b {kv_b.shape}, latents of {size}"
        assert kv_b.is_contiguous(), "kv_b must be dense"
        assert kv_b.dtype == q.dtype, f"kv_b {kv_b.dtype}, q {q.dtype}"


def mla_query_launcher(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_b: Tensor | None,
) -> Tensor:
    _check(q, latent, norm, cos_sin, cache, kv_b)
    assert positions.is_contiguous(), "positions must be dense"
    assert slots.is_contiguous(), "slots must be dense"
    out = _fake(q, latent, norm, eps, positions, cos_sin, cache, slots, kv_b)
    tokens, heads, dim = q.shape
    if tokens == 0:
        return out
    size, rotary = norm.shape[0], cos_sin.shape[1]
    rows = max(16, min(64, next_power_of_2(tokens)))
    blocks = -(-tokens // rows)
    block_column = column_block(size, blocks * heads, multiprocessors(q.device))
    columns = 0 if kv_b is None else -(-size // block_column)
    pdl = dependent_launch(q.device)
    _mla_query_kernel[(blocks * heads * (columns + 1) + tokens,)](
        q, latent, norm, positions, cos_sin, cache, slots, q if kv_b is None else kv_b, out, tokens,
        q.stride(0), q.stride(1), latent.stride(0), 0 if kv_b is None else kv_b.stride(0), eps,
        heads, dim - rotary, rotary // 2, size, columns, rows, block_column,
        padded_dim(dim - rotary), next_power_of_2(size), next_power_of_2(rotary // 2),
        dot_precision(q.device), bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
    return out


def column_block(width: int, programs: int, processors: int) -> int:
    """Columns of a program where each of ``programs`` has ``width``: few enough to employ all
    multiprocessors."""
    block = min(64, max(16, next_power_of_2(width)))
    while block > 16 and programs * -(-width // block) < processors:
        block //= 2
    return block


mla_query = op(
    "mla_query(Tensor q, Tensor latent, Tensor norm, float eps, Tensor positions, Tensor cos_sin, "
    "Tensor(a!) cache, Tensor slots, Tensor? kv_b) -> Tensor",
    mla_query_reference,
    mla_query_launcher,
    _fake,
)


def _case(
    tokens: int,
    heads: int,
    sizes: tuple[int, int, int, int],
    options: str = "",
    interpret: bool = True,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``sizes`` are L, Dn, R, Dv; ``options``: "rope" (without ``kv_b``), "skip" (negative slots),
    "int32" (positions and slots). The cache starts as NaN."""
    size, plain, rotary, value = sizes

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        # As they come out of one product, and behind it what is nobody's.
        width = heads * (plain + rotary)
        rows = random((tokens, width + size + rotary + 8), dtype, device, 71)
        q = rows[:, :width].unflatten(1, (heads, plain + rotary))  # type: ignore[no-untyped-call]
        positions = (torch.arange(tokens) * 7 + 3) % 300
        blocks = -(-tokens // 16) + 2
        order = torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(72))
        slots = order[:tokens].clone()
        if "skip" in options:
            slots[::3] = -1
        if "int32" in options:
            positions, slots = positions.int(), slots.int()
        cache = torch.full((blocks, 16, 1, size + rotary), float("nan"), dtype=dtype, device=device)
        kv_b = random((heads, plain + value, size), dtype, device, 73) * plain**-0.5
        return (
            q, rows[:, width:-8], random((size,), torch.float32, device, 74), 1e-6,
            positions.to(device), rotary_table(300, rotary).to(device), cache, slots.to(device),
            None if "rope" in options else kv_b,
        )  # fmt: skip

    name = f"mla_query-{tokens}x{heads}-{'-'.join(map(str, sizes))}{'-' * bool(options)}{options}"
    reference, launcher = mla_query_reference, mla_query_launcher
    return Case(name, mla_query, reference, launcher, build, (6,), interpret, aot)


_LITE = (512, 128, 64, 128)  # DeepSeek V2, V3


def _cases() -> Iterator[Case]:
    yield _case(1, 4, _LITE, aot=BOTH)
    yield _case(3, 2, (24, 20, 10, 12), aot=BF16)
    yield _case(70, 3, (40, 16, 8, 24), "skip")
    yield _case(5, 2, (33, 128, 2, 8), "int32-skip")
    yield _case(0, 4, (32, 16, 8, 16))
    yield _case(9, 3, (24, 20, 10, 12), "rope-skip", aot=BF16)
    yield _case(2, 2, (512, 128, 64, 128), "rope-int32")
    yield _case(1, 128, _LITE, interpret=False)
    yield _case(64, 16, _LITE, interpret=False, aot=BF16)
    yield _case(1000, 16, _LITE, "rope", interpret=False)


CASES = tuple(_cases())
