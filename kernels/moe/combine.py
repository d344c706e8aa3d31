"""``stream[t] += sum over j of weights[t, j] * y[t * k + j]``: the experts' results put together.

``y`` is ``[T * k, D]``, or with ``places`` (int32 ``[T * k]``) has the row of a pair at its place;
it is f32, f16 or bf16, ``weights`` float32 ``[T, k]``, ``stream`` float32
``[T, D]``, its rows may be strided. Sums are float32, in the order of j.
"""

from torch import Tensor

from squall.kernels.lang import tl, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch

_BLOCK = 512


@kernel
def _combine_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    places_ptr,
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
        row = pair
        if places_ptr is not None:
            row = tl.load(places_ptr + pair).to(tl.int64)
        y = tl.load(y_ptr + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * y
    tl.store(target, total, mask=inside)


def combine(y: Tensor, places: Tensor | None, weights: Tensor, stream: Tensor) -> None:
    """Add to ``stream`` (see the module's docstring); T >= 1."""
    (tokens, dim), top_k = stream.shape, weights.shape[1]
    assert y.shape[1] == dim, f"y {y.shape}, stream {stream.shape}"
    assert places is not None or y.shape[0] == tokens * top_k, f"y {y.shape}"
    assert y.is_contiguous() and weights.is_contiguous(), "rows must be dense"  # noqa: PT018
    launch = dependent_launch(y.device)
    _combine_kernel[(tokens, -(-dim // _BLOCK))](
        y, places, weights, stream, stream.stride(0), dim, top_k, _BLOCK, bool(launch),
        num_warps=4, **launch,
    )  # fmt: skip
