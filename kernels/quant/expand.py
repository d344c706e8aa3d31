"""Quantised weights back to floating point: whole matrices, and rows picked by number.

``expand_planes(low, high, scales, supers, ggml_type, in_features, dtype)`` gives ``[N, K]`` of
``dtype``, dense; a slice of rows of the planes gives these rows. A product with many rows of
activations takes this first and the vendor's library then. ``plane_rows(..., ids, dtype)`` gives
rows ``ids`` (int32 or int64 ``[T]``, each in ``[0, N)``) as ``[T, K]``: an embedding lookup.

Planes as in :mod:`squall.kernels.quant.planes`. The float32 value of a weight is exact but for the
rounding of the sum with its minimum, that is, the bits of ``QuantFormat.dequantize`` on every
device; it is then rounded to ``dtype`` (f32, f16, bf16).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.cases import BF16, BOTH, Case
from squall.kernels.lang import next_power_of_2, tl
from squall.kernels.launch import kernel
from squall.kernels.op import op
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.mxfp4_bits import integer, power
from squall.kernels.quant.planes import Planes, dequantize, layout, padded, random_planes


def expand_planes_reference(
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    planes = Planes(gguf_formats()[ggml_type], in_features, low, high, scales, supers)
    return dequantize(planes).to(dtype)


def plane_rows_reference(
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    in_features: int,
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    rows = ids.long()
    high, supers = (None if t is None else t[rows] for t in (high, supers))
    return expand_planes_reference(
        low[rows], high, scales[rows], supers, ggml_type, in_features, dtype
    )


@kernel
def _expand_kernel(  # type: ignore[no-untyped-def]
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    ids_ptr,
    out_ptr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows of out, blocks of BLOCK columns)."""
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row
    if ids_ptr is not None:
        row = tl.load(ids_ptr + out_row).to(tl.int64)
    # Four weights at a time: one word of the low plane, one bit field of each of its bytes. Bit
    # operations on indices keep the compiler from loading vectors that it then has to spread.
    four = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[:, None]
    inside = four < PADDED // 4
    lane = four & 7
    run = four >> 3
    byte = tl.arange(0, 4)[None, :]
    word = tl.load(
        low_ptr + row * (PADDED * LOW // 32) + ((run // (8 // LOW)) * 8 + lane),
        mask=inside,
        other=0,
        eviction_policy="evict_first",
    )
    if LOW == 8:
        q = (word << (24 - 8 * byte)) >> 24
    else:
        q = ((word >> ((run % (8 // LOW)) * LOW)) >> (8 * byte)) & ((1 << LOW) - 1)
    if HIGH > 0:
        extra = tl.load(
            high_ptr + row * (PADDED * HIGH // 32) + ((run // (8 // HIGH)) * 8 + lane),
            mask=inside,
            other=0,
            eviction_policy="evict_first",
        )
        field = ((extra >> ((run % (8 // HIGH)) * HIGH)) >> (8 * byte)) & ((1 << HIGH) - 1)
        q |= field << LOW
    group = four >> (2 if GROUP == 16 else 3)
    scale_row = row * (PADDED // GROUP)
    if PAIRED:
        place = scales_ptr + (scale_row + group) * 2
        scale = tl.load(place, mask=inside, other=0).to(tl.float32)
        minimum = tl.load(place + 1, mask=inside, other=0).to(tl.float32)
        if supers_ptr is not None:
            place = supers_ptr + (row * (PADDED // 256) + (four >> 6)) * 2
            scale *= tl.load(place, mask=inside, other=0.0).to(tl.float32)
            minimum *= tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
            weight = q.to(tl.float32) * scale - minimum
        else:
            weight = q.to(tl.float32) * scale + minimum
    elif POWER:
        exponent = tl.load(scales_ptr + scale_row + group, mask=inside, other=0).to(tl.int32)
        weight = integer(q).to(tl.float32) * power(exponent)
    else:
        scale = tl.load(scales_ptr + scale_row + group, mask=inside, other=0).to(tl.float32)
        if supers_ptr is not None:
            place = supers_ptr + row * (PADDED // 256) + (four >> 6)
            scale *= tl.load(place, mask=inside, other=0.0).to(tl.float32)
        weight = (q - OFFSET).to(tl.float32) * scale
    column = four * 4 + byte
    target = out_ptr + out_row * K + column
    tl.store(target, weight.to(out_ptr.dtype.element_ty), mask=column < K)


def _expand(
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    ggml_type: int,
    in_features: int,
    ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    low, high, scales, supers = planes
    plan, width = layout(ggml_type), padded(in_features)
    assert low.shape[1] * 32 == width * plan.low_bits, f"low {low.shape} for rows of {in_features}"
    for plane in planes:
        assert plane is None or plane.is_contiguous(), "planes must be contiguous"
    rows = low.shape[0] if ids is None else ids.shape[0]
    out = torch.empty(rows, in_features, dtype=dtype, device=low.device)
    if rows:
        block = min(4096, next_power_of_2(width))
        _expand_kernel[(rows, -(-in_features // block))](
            low,
            high,
            scales,
            supers,
            ids,
            out,
            in_features,
            width,
            plan.low_bits,
            plan.high_bits,
            plan.offset,
            plan.group,
            plan.paired,
            plan.scales == "power",
            block,
            num_warps=max(1, block // 512),
        )
    return out


def expand_planes_launcher(
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return _expand((low, high, scales, supers), ggml_type, in_features, None, dtype)


def plane_rows_launcher(
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    in_features: int,
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    assert ids.dim() == 1, f"ids {ids.shape}"
    assert ids.is_contiguous(), "ids must be dense"
    return _expand((low, high, scales, supers), ggml_type, in_features, ids, dtype)


def _plane_rows_fake(
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    in_features: int,
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return low.new_empty((ids.shape[0], in_features), dtype=dtype)


_PLANES = "Tensor low, Tensor? high, Tensor scales, Tensor? supers, int ggml_type, int in_features"
expand_planes = op(
    f"expand_planes({_PLANES}, ScalarType dtype) -> Tensor",
    expand_planes_reference,
    expand_planes_launcher,
)
plane_rows = op(
    f"plane_rows({_PLANES}, Tensor ids, ScalarType dtype) -> Tensor",
    plane_rows_reference,
    plane_rows_launcher,
    _plane_rows_fake,
)


def _planes(name: str, rows: int, k: int, device: torch.device) -> tuple[object, ...]:
    entry = next(e for e in gguf_formats().values() if e.name == name)
    generator = torch.Generator().manual_seed(51)
    planes = random_planes(entry, rows, k, torch.device("cpu"), generator)
    tensors = [None if t is None else t.to(device) for t in planes.tensors]
    return *tensors, entry.ggml_type, k


def _expand_case(name: str, rows: int, k: int, aot: tuple[torch.dtype, ...] = ()) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        return *_planes(name, rows, k, device), dtype

    fns = expand_planes, expand_planes_reference, expand_planes_launcher
    return Case(f"expand_planes-{name}-{rows}x{k}", *fns, build, aot=aot)


def _rows_case(name: str, k: int, ids: tuple[int, ...], index: torch.dtype) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        return *_planes(name, 11, k, device), torch.tensor(ids, dtype=index, device=device), dtype

    fns = plane_rows, plane_rows_reference, plane_rows_launcher
    title = f"plane_rows-{name}-{len(ids)}x{k}-{str(index).removeprefix('torch.')}"
    return Case(title, *fns, build, aot=BF16 * (k >= 2048))


def _cases() -> Iterator[Case]:
    for entry in gguf_formats().values():
        if entry.unpack is not None:
            yield _expand_case(entry.name, 3, 4096, BOTH if entry.name == "Q4_K" else BF16)
            yield _expand_case(entry.name, 5, 768)
            if entry.block_size == 32:
                yield _expand_case(entry.name, 7, 96)
    yield _rows_case("Q4_K", 2048, (3, 0, 10, 3), torch.int64)
    yield _rows_case("Q6_K", 2048, (10, 1), torch.int32)
    yield _rows_case("Q8_0", 96, (), torch.int64)
    yield _rows_case("Q4_1", 576, (5,), torch.int32)


CASES = tuple(_cases())
