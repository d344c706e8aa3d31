"""``stream[t] += sum over j of weights[t, j] * y[t * k + j]``: the experts' results put together.

``y`` is ``[T * k, D]``, f32, f16 or bf16, ``weights`` float32 ``[T, k]``, ``stream`` float32
``[T, D]``, its rows may be strided. Sums are float32, in the order of j.
"""

import torch
from torch import Tensor

from squall.kernels.cases import BOTH, Case, random
from squall.kernels.lang import tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op

_BLOCK = 512


def combine_experts_reference(y: Tensor, weights: Tensor, stream: Tensor) -> None:
    stream += torch.einsum("tk,tkd->td", weights, y.float().view(*weights.shape, -1))


@kernel
def _combine_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    weights_ptr,
    stream_ptr,
    stream_stride,
    DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    wait_for_inputs(PDL)
    target = stream_ptr + token * stream_stride + column
    total = tl.load(target, mask=inside, other=0.0)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        y = tl.load(y_ptr + pair * DIM + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * y
    tl.store(target, total, mask=inside)


def combine_experts_launcher(y: Tensor, weights: Tensor, stream: Tensor) -> None:
    (tokens, dim), top_k = stream.shape, weights.shape[1]
    assert y.shape == (tokens * top_k, dim), f"y {y.shape}, stream {stream.shape}"
    assert y.is_contiguous() and weights.is_contiguous(), "rows must be dense"  # noqa: PT018
    if tokens == 0:
        return
    launch = dependent_launch(y.device)
    _combine_kernel[(tokens, -(-dim // _BLOCK))](
        y, weights, stream, stream.stride(0), dim, top_k, _BLOCK, bool(launch),
        num_warps=4, **launch,
    )  # fmt: skip


def _fake(*_arguments: object) -> None:
    return None


combine_experts = op(
    "combine_experts(Tensor y, Tensor weights, Tensor(a!) stream) -> ()",
    combine_experts_reference,
    combine_experts_launcher,
    _fake,
)


def _case(tokens: int, top_k: int, dim: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        y = random((tokens * top_k, dim), dtype, device, 91)
        weights = random((tokens, top_k), torch.float32, device, 92)
        return y, weights, random((tokens, dim + 4), torch.float32, device, 93)[:, 4:]

    fns = combine_experts, combine_experts_reference, combine_experts_launcher
    title = f"combine_experts-{tokens}x{top_k}x{dim}"
    return Case(title, *fns, build, mutates=(2,), aot=BOTH * (top_k == 8))


CASES = tuple(_case(*size) for size in ((1, 8, 2048), (0, 2, 16), (5, 3, 700), (70, 1, 33)))
