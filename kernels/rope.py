"""Rotary position embedding, half-split ("neox") layout.

``q [T, H, D]`` and ``k [T, KV, D]`` (f32, f16, bf16; tokens and heads may be strided, the last
dimension is dense), ``positions`` int64 ``[T]``, ``cos_sin`` float32 ``[P, R]``: row p holds R/2
cosines, then R/2 sines of position p. The first ``R <= D`` dimensions are rotated in float32,
dimension i being paired with i + R/2 (Su et al. 2021, arXiv:2104.09864, in the pairing that
Hugging Face checkpoints use); the rest pass through. Results are dense and rounded once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.cases import BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.op import op


def apply_rope_reference(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotated ``(q, k)``, dense copies. Both in one go: on a CPU calls cost more than copies."""
    tokens, q_heads, dim = q.shape
    heads, rotary = q_heads + k.shape[1], cos_sin.shape[1]
    x = torch.cat((q, k), 1)
    rotated = x if rotary == dim else x[..., :rotary]
    if x.dtype != torch.float32:
        rotated = rotated.float()
    angles = cos_sin.index_select(0, positions).view(tokens, 1, 2, rotary // 2)
    sin = angles.select(2, 1)
    pairs = rotated.view(tokens, heads, 2, rotary // 2)
    y = pairs * angles.narrow(2, 0, 1)
    first, second = pairs.unbind(2)
    first_out, second_out = y.unbind(2)
    first_out.addcmul_(second, sin, value=-1)
    second_out.addcmul_(first, sin)
    y = y.view(tokens, heads, rotary)
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    if rotary != dim:
        y = torch.cat((y, x[..., rotary:]), -1)
    split_copy = torch.ops.aten.split_with_sizes_copy.default
    q_out, k_out = split_copy(y, (q_heads, heads - q_heads), 1)
    return q_out, k_out


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    table_ptr,
    token,
    first,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Rotate BLOCK_HEADS heads of one token; table_ptr is its row of cos_sin."""
    head = first + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
    rotated = d < 2 * HALF
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    angle = tl.where(d < HALF, d, d - HALF)
    cos = tl.load(table_ptr + angle, mask=rotated, other=1.0)
    sin = tl.load(table_ptr + HALF + angle, mask=rotated, other=0.0)
    sin = tl.where(d < HALF, -sin, sin)
    source = x_ptr + token * token_stride + head[:, None].to(tl.int64) * head_stride
    x = tl.load(source + d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask & rotated[None, :], other=0.0)
    y = x * cos[None, :] + other.to(tl.float32) * sin[None, :]
    offsets = token * (HEADS * DIM) + head[:, None] * DIM + d[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    positions_ptr,
    table_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Grid (tokens, blocks of q heads + blocks of k heads)."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    if block < q_blocks:
        _rotate_heads(
            q_ptr, q_out_ptr, row, token, block * BLOCK_HEADS, q_token_stride, q_head_stride,
            Q_HEADS, DIM, HALF, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, k_out_ptr, row, token, (block - q_blocks) * BLOCK_HEADS, k_token_stride,
            k_head_stride, K_HEADS, DIM, HALF, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip


def apply_rope_launcher(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, q_heads, dim = q.shape
    k_heads, rotary = k.shape[1], cos_sin.shape[1]
    assert k.shape == (tokens, k_heads, dim), f"q {q.shape}, k {k.shape}"
    assert rotary % 2 == 0, f"{rotary} rotary dimensions"
    assert rotary <= dim, f"{rotary} rotary dimensions of {dim}"
    assert q.stride(2) == k.stride(2) == 1, "heads must be dense"
    assert cos_sin.is_contiguous(), "cos_sin must be dense"
    assert positions.is_contiguous(), "positions must be dense"
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if tokens == 0:
        return q_out, k_out
    block_dim = next_power_of_2(dim)
    block_heads = max(1, min(1024 // block_dim, next_power_of_2(q_heads)))
    blocks = -(-q_heads // block_heads) + -(-k_heads // block_heads)
    _rope_kernel[(tokens, blocks)](
        q, k, q_out, k_out, positions, cos_sin,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        q_heads, k_heads, dim, rotary // 2, block_heads, block_dim, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


apply_rope = op(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor cos_sin) -> (Tensor, Tensor)",
    apply_rope_reference,
    apply_rope_launcher,
)


def _case(tokens: int, heads: tuple[int, int], dim: int, rotary: int, fused: bool) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, kv = heads
        qkv = random((tokens, h + 2 * kv, dim), dtype, device, 11)
        q, k = qkv[:, :h], qkv[:, h : h + kv]
        if not fused:
            q, k = q.contiguous(), k.contiguous()
        angles = torch.arange(300.0)[:, None] / 10000 ** (torch.arange(rotary // 2) / rotary * 2)
        table = torch.cat((angles.cos(), angles.sin()), -1).to(device)
        positions = (torch.arange(tokens) * 7 + 3) % 300
        return q, k, positions.to(device), table

    name = f"apply_rope-{tokens}x{heads[0]}+{heads[1]}x{dim}-r{rotary}{'-fused' if fused else ''}"
    fn, reference, launcher = apply_rope, apply_rope_reference, apply_rope_launcher
    aot = BOTH * (dim in (64, 80) and 0 < tokens < 9)
    return Case(name, fn, reference, launcher, build, interpret=tokens < 100, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case(1, (9, 3), 64, 64, fused=True)
    yield _case(0, (4, 4), 64, 64, fused=True)
    yield _case(63, (4, 1), 128, 128, fused=False)
    yield _case(5, (8, 2), 80, 32, fused=True)
    yield _case(3, (7, 1), 96, 96, fused=True)
    yield _case(2, (3, 3), 192, 64, fused=False)
    yield _case(4, (4, 1), 256, 256, fused=True)
    yield _case(1000, (2, 1), 64, 2, fused=False)


CASES = tuple(_cases())
