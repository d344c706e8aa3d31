"""What the fused linear kernels share: which weight rows a program takes, and what it does with
their products before they are stored.

Gated weights are ``[2F, K]``, gate rows then up rows. A program's tile holds as many gate rows as
up rows, the first half of the tile being gate, so that it can finish ``act(gate) * up`` itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squall.kernels.lang import tl, triton


@dataclass(frozen=True)
class Epilogue:
    """``out = act(product + bias)``, or ``out += product + bias``.

    ``out`` is ``[M, F]`` with dense columns: F is N, or N / 2 where ``activation`` (see
    :mod:`squall.kernels.activation`) is not "none". ``bias`` is ``[N]`` or None.
    With ``add``, ``out`` is float32.
    """

    out: Tensor
    bias: Tensor | None = None
    activation: str = "none"
    add: bool = False

    @property
    def gated(self) -> bool:
        return self.activation != "none"

    @property
    def features(self) -> int:
        return self.out.shape[1]

    def split_at(self, column: int) -> "tuple[Epilogue, Epilogue]":
        """Both sides of a column of ``out``, without activation."""
        assert not self.gated, "columns of gate and up belong together"
        left, right = slice(column), slice(column, None)
        bias = (None, None) if self.bias is None else (self.bias[left], self.bias[right])
        sides = zip((self.out[:, left], self.out[:, right]), bias, strict=True)
        first, second = (replace(self, out=out, bias=some) for out, some in sides)
        return first, second

    def check(self, x: Tensor, w: Tensor) -> None:
        """Assert that the shapes of ``x [M, K]`` and ``w [N, K]`` fit and that rows are dense."""
        out, rows = self.out, self.features * (1 + self.gated)
        assert x.shape == (out.shape[0], w.shape[1]), f"x {x.shape}, w {w.shape}, out {out.shape}"
        assert w.shape[0] == rows, f"w {w.shape} for out {out.shape}, {self.activation}"
        assert x.stride(1) == w.stride(1) == out.stride(1) == 1, "rows must be dense"
        assert self.bias is None or self.bias.shape == (rows,), f"bias for {rows} rows"
        assert not self.add or (out.dtype == torch.float32 and not self.gated), "stream"


@triton.jit
def weight_rows(tile, features, TILE: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``[TILE]`` of the weight for tile number ``tile``, int64.

    Rows past the end repeat the last one: loading them needs no mask, and nothing stores them.
    """
    if GATED:
        i = tl.arange(0, TILE)
        feature = tl.minimum(tile * (TILE // 2) + i % (TILE // 2), features - 1)
        row = tl.where(i < TILE // 2, feature, feature + features)
    else:
        row = tl.minimum(tile * TILE + tl.arange(0, TILE), features - 1)
    return row.to(tl.int64)


@triton.jit
def gate(z, up, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``act(z) * up``; the formulas are those of :mod:`squall.kernels.activation`."""
    if ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), and 1.5957691216 is 2 * sqrt(2 / pi).
        y = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z)) * up
    elif ACTIVATION == "clamped_silu":
        z = tl.minimum(z, 7.0)
        y = z * tl.sigmoid(1.702 * z) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        y = z * tl.sigmoid(z) * up
    return y


@triton.jit
def store(target, y, mask, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write float32 ``y``, or add it to what is there.

    Every element is added to once, so the sum does not depend on any order; the atomic is there
    because nobody waits for it, while a load would keep the program until the data arrives.
    """
    if ADD:
        tl.atomic_add(target, y, mask=mask, sem="relaxed")
    else:
        tl.store(target, y.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _places(N: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]


@triton.jit
def is_last_part(z, parts_ptr, counter_ptr, part, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave a part's sums ``z [N, M]`` of a tile in ``parts_ptr``, float32 [SPLIT, N, M], and say
    whether all parts are there now; then ``sum_of_parts`` may follow."""
    SIZE: tl.constexpr = z.shape[0] * z.shape[1]
    tl.store(parts_ptr + part * SIZE + _places(z.shape[0], z.shape[1]), z)
    tl.debug_barrier()  # all threads' sums are written before one thread says so
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@triton.jit
def sum_of_parts(  # type: ignore[no-untyped-def]
    parts_ptr, counter_ptr, N: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr
):
    """``[N, M]``: the parts in their order. Sets the counter back."""
    tl.store(counter_ptr, 0)
    z = tl.load(parts_ptr + _places(N, M), cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT):
        z += tl.load(parts_ptr + part * (N * M) + _places(N, M), cache_modifier=".cg")
    return z


@triton.jit
def finish_tile(  # type: ignore[no-untyped-def]
    z,
    bias_ptr,
    y_ptr,
    row,
    rows,
    features,
    y_stride,
    tile,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
):
    """Bias, activation and store of a finished tile ``z [weight rows, rows of x]``; ``row`` int64
    are the rows of x, of which there are ``rows``."""
    TILE: tl.constexpr = z.shape[0]
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    if bias_ptr is not None:
        z += tl.load(bias_ptr + weight_rows(tile, features, TILE, GATED)).to(tl.float32)[:, None]
    if GATED:
        z, up = tl.split(z.reshape(2, OUT, z.shape[1]).permute(1, 2, 0))
        z = gate(z, up, ACTIVATION)
    feature = tile * OUT + tl.arange(0, OUT)
    target = y_ptr + row[None, :] * y_stride + feature[:, None]
    store(target, z, (row < rows)[None, :] & (feature < features)[:, None], ADD)


@triton.jit
def finish_row(  # type: ignore[no-untyped-def]
    y,
    tile,
    tiles,
    features,
    bias_ptr,
    y_ptr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
):
    """Bias, activation and store of the sums ``y [1, weight rows]`` of tile number ``tile``;
    nothing is stored past the last of ``tiles``."""
    TILE: tl.constexpr = y.shape[1]
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    if bias_ptr is not None:
        y += tl.load(bias_ptr + weight_rows(tile, features, TILE, GATED)).to(tl.float32)[None, :]
    if GATED:
        z, up = tl.split(y.reshape(1, 2, OUT).permute(0, 2, 1))
        y = gate(z, up, ACTIVATION)
    feature = tile * OUT + tl.arange(0, OUT)[None, :]
    store(y_ptr + feature, y, (feature < features) & (tile < tiles), ADD)
