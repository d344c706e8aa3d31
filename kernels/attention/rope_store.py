"""Head norms, rotary embedding and the write to the paged cache, in one pass over q, k, v.

``qkv`` ``[T, (H + 2 KV) D]`` (f32, f16, bf16; rows may be strided, columns are dense) holds H query
heads, then KV key and KV value heads of D elements; KV and D are those of ``k_cache``, ``v_cache``
``[blocks, block_size, KV, D]`` (dense; f32, f16, bf16 or float8_e4m3fn, saturating). For q and k:

    x = x / sqrt(mean(x^2) + eps) * norm          where a norm is given, float32 ``[D]``
    x_i, x_i+R/2 = x_i c_i - x_i+R/2 s_i, x_i+R/2 c_i + x_i s_i          for i < R/2

``cos_sin`` is float32 ``[P, R]``, R <= D: row p holds R/2 cosines c, then R/2 sines s of position
p (Su et al. 2021, arXiv:2104.09864, in the pairing of Hugging Face checkpoints); dimensions from R
on are not rotated. ``positions`` and ``slots`` are int32 or int64 ``[T]``. k and v of token t go to
slot ``slots[t]`` (block * block_size + offset) of their cache; a negative slot stores nothing, and
no two tokens of a call may share one. All is computed in float32 and rounded once, k to the dtype
of its cache, q to that of ``qkv``. Result: q ``[T, H, D]``, dense.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.attention.fp8 import stored_as, to_cache_dtype, written
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op


def rope_store_kv_reference(
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
    kv_heads, dim = k_cache.shape[2:]
    count = qkv.shape[1] // dim
    parts = (count - 2 * kv_heads, kv_heads, kv_heads)
    q, k, v = qkv.view(qkv.shape[0], count, dim).split_with_sizes(parts, dim=1)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    q, k = (turned(x, norm, eps, cos, sin) for x, norm in ((q, q_norm), (k, k_norm)))
    store(k, k_cache, slots)
    store(v, v_cache, slots)
    return q.to(qkv.dtype)


def turned(x: Tensor, norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Normed and rotated copy, float32."""
    x = x.float()
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    half = cos.shape[-1]
    first, second, rest = x.split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def store(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    kept = (slots >= 0).nonzero().squeeze(1)
    new = written(to_cache_dtype(x.index_select(0, kept), cache.dtype))
    written(cache).flatten(0, 1).index_copy_(0, slots.index_select(0, kept).long(), new)


def _fake(
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
    kv_heads, dim = k_cache.shape[2:]
    shape = (qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads, dim)
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, head, HEADS: tl.constexpr, DIM: tl.constexpr, START: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Dimensions START ... START + SIZE - 1 of heads, times the norm's weight; their sum of
    squares without it."""
    d = tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (d < SIZE)[None, :]
    source = x_ptr + head[:, None] * DIM + START + d[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if NORM:
        x *= tl.load(norm_ptr + START + d, mask=d < SIZE, other=0.0)[None, :]
    return x, squares


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    y_ptr, x, head, HEADS: tl.constexpr, DIM: tl.constexpr, START: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (d < SIZE)[None, :]
    target = y_ptr + head[:, None] * DIM + START + d[None, :]
    tl.store(target, stored_as(x, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    table_ptr,
    y_ptr,
    first,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Norm and rotate heads ``first`` onwards of ``x_ptr`` [HEADS, DIM] into ``y_ptr``."""
    head = first + tl.arange(0, BLOCK_HEADS)
    a, squares_a = _part(x_ptr, norm_ptr, head, HEADS, DIM, 0, HALF, BLOCK_HALF, NORM)
    b, squares_b = _part(x_ptr, norm_ptr, head, HEADS, DIM, HALF, HALF, BLOCK_HALF, NORM)
    squares = squares_a + squares_b
    d = tl.arange(0, BLOCK_HALF)
    cos = tl.load(table_ptr + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(table_ptr + HALF + d, mask=d < HALF, other=0.0)[None, :]
    if DIM > 2 * HALF:
        rest, squares_rest = _part(
            x_ptr, norm_ptr, head, HEADS, DIM, 2 * HALF, DIM - 2 * HALF, BLOCK_REST, NORM
        )
        squares += squares_rest
    if NORM:
        factor = tl.rsqrt(squares / DIM + eps)[:, None]
        a *= factor
        b *= factor
        if DIM > 2 * HALF:
            rest *= factor
    _put(y_ptr, a * cos - b * sin, head, HEADS, DIM, 0, HALF, BLOCK_HALF)
    _put(y_ptr, b * cos + a * sin, head, HEADS, DIM, HALF, HALF, BLOCK_HALF)
    if DIM > 2 * HALF:
        _put(y_ptr, rest, head, HEADS, DIM, 2 * HALF, DIM - 2 * HALF, BLOCK_REST)


@kernel
def _rope_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    positions_ptr,
    table_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of q heads + of k heads + of v heads)."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    x_ptr = qkv_ptr + token * qkv_stride
    angles_ptr = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if block < q_blocks:
        _turn_heads(
            x_ptr, q_norm_ptr, angles_ptr, q_ptr + token * (HEADS * DIM), block * BLOCK_HEADS,
            eps, HEADS, DIM, HALF, Q_NORM, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif slot >= 0:
        x_ptr += HEADS * DIM
        place = slot * (KV_HEADS * DIM)
        if block < q_blocks + kv_blocks:
            _turn_heads(
                x_ptr, k_norm_ptr, angles_ptr, k_cache_ptr + place,
                (block - q_blocks) * BLOCK_HEADS, eps, KV_HEADS, DIM, HALF, K_NORM,
                BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        else:
            first = (block - q_blocks - kv_blocks) * BLOCK_HEADS
            head = first + tl.arange(0, BLOCK_HEADS)
            x_ptr += KV_HEADS * DIM
            v, _squares = _part(x_ptr, x_ptr, head, KV_HEADS, DIM, 0, DIM, BLOCK_DIM, False)
            _put(v_cache_ptr + place, v, head, KV_HEADS, DIM, 0, DIM, BLOCK_DIM)


def check_rope(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    """What the kernels take for granted."""
    width, rotary = qkv.shape[1], cos_sin.shape[1]
    kv_heads, dim = k_cache.shape[2:]
    assert width > 2 * kv_heads * dim, f"qkv {qkv.shape}, cache {k_cache.shape}"
    assert width % dim == 0, f"qkv {qkv.shape}, cache {k_cache.shape}"
    assert v_cache.shape == k_cache.shape, f"caches {k_cache.shape} and {v_cache.shape}"
    assert k_cache.is_contiguous(), "the caches must be dense"
    assert v_cache.is_contiguous(), "the caches must be dense"
    assert 0 < rotary <= dim, f"{rotary} rotary dimensions of {dim}"
    assert rotary % 2 == 0, f"{rotary} rotary dimensions"
    assert qkv.stride(1) == 1, "rows of qkv must be dense"
    for vector in (cos_sin, positions, slots):
        assert vector.is_contiguous(), "cos_sin, positions and slots must be dense"


def rope_store_kv_launcher(
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
    check_rope(qkv, positions, cos_sin, k_cache, v_cache, slots)
    tokens, width = qkv.shape
    kv_heads, dim = k_cache.shape[2:]
    heads, rotary = width // dim - 2 * kv_heads, cos_sin.shape[1]
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    block_heads = max(1, min(512 // next_power_of_2(dim), next_power_of_2(kv_heads)))
    blocks = -(-heads // block_heads) + 2 * -(-kv_heads // block_heads)
    pdl = dependent_launch(qkv.device)
    _rope_store_kernel[(tokens, blocks)](
        qkv, cos_sin if q_norm is None else q_norm, cos_sin if k_norm is None else k_norm,
        positions, cos_sin, q, written(k_cache), written(v_cache), slots, qkv.stride(0), eps,
        heads, kv_heads, dim, rotary // 2, q_norm is not None, k_norm is not None, block_heads,
        next_power_of_2(rotary // 2), next_power_of_2(max(1, dim - rotary)), next_power_of_2(dim),
        bool(pdl), num_warps=2, **pdl,
    )  # fmt: skip
    return q


rope_store_kv = op(
    "rope_store_kv(Tensor qkv, Tensor? q_norm, Tensor? k_norm, float eps, Tensor positions, "
    "Tensor cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
    rope_store_kv_reference,
    rope_store_kv_launcher,
    _fake,
)


def rotary_table(positions: int, rotary: int) -> Tensor:
    angles = torch.arange(float(positions))[:, None]
    angles = angles / 10000 ** (torch.arange(rotary // 2) / rotary * 2)
    return torch.cat((angles.cos(), angles.sin()), -1)


def _case(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    rotary: int,
    options: str = "",
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    """``options``: "norm", "skip" (negative slots), "int32" (positions and slots), "bf16" (of the
    caches, which start as NaN)."""

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        h, kv = heads
        qkv = random((tokens, (h + 2 * kv) * dim + 8), dtype, device, 11)[:, :-8]
        norms = [random((dim,), torch.float32, device, 12 + i) for i in range(2)]
        positions = (torch.arange(tokens) * 7 + 3) % 300
        blocks = -(-tokens // 16) + 2
        order = torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(13))
        slots = order[:tokens].clone()
        if "skip" in options:
            slots[::3] = -1
        if "int32" in options:
            positions, slots = positions.int(), slots.int()
        shape = (blocks, 16, kv, dim)
        kept = torch.bfloat16 if "bf16" in options else dtype
        caches = [torch.full(shape, float("nan"), dtype=kept, device=device) for _ in range(2)]
        normed = norms if "norm" in options else [None, None]
        table = rotary_table(300, rotary).to(device)
        return qkv, *normed, 1e-6, positions.to(device), table, *caches, slots.to(device)

    name = f"rope_store_kv-{tokens}x{heads[0]}+{heads[1]}x{dim}-r{rotary}"
    fn, reference, launcher = rope_store_kv, rope_store_kv_reference, rope_store_kv_launcher
    name += "-" * bool(options) + options
    return Case(name, fn, reference, launcher, build, (6, 7), tokens < 100, aot)


def _cases() -> Iterator[Case]:
    yield _case(1, (9, 3), 64, 64, aot=BOTH)
    yield _case(0, (4, 4), 64, 64)
    yield _case(63, (4, 1), 128, 128, "norm-skip", aot=BF16)
    yield _case(5, (8, 2), 80, 32, "norm-int32", aot=BOTH)
    yield _case(3, (7, 1), 96, 96, "skip-int32")
    yield _case(2, (3, 3), 192, 64, "norm-bf16")
    yield _case(4, (4, 1), 256, 256, aot=BF16)
    yield _case(7, (32, 8), 128, 128)
    yield _case(1000, (2, 1), 64, 2, "skip")


CASES = tuple(_cases())
