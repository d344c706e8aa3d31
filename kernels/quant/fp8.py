"""Block-scaled FP8 weights, as DeepSeek V3 and Qwen 3 publish them, back to floating point.

A weight ``[N, K]`` is ``data``, uint8 ``[N, K]`` with the bits of float8_e4m3fn (sign, 4 exponent
bits of bias 7, 3 mantissa bits; no infinities), and ``scales``, float32:

    weight[n, k] = e4m3(data[n, k]) * scales[n / height, k / 128]

(``weight_scale_inv`` of a checkpoint, which multiplies in spite of its name). A checkpoint's
``height`` is 128. Weights that were put together or reordered so that their blocks are cut have
a smaller one, a power of two down to 1, and each row of scales as often as it takes. DeepSeek-AI
2024, arXiv:2412.19437, section 3.3.2.

``fp8_expand(data, scales, height, start, stop, dtype)`` gives rows start to stop, ``[rows, K]`` of
``dtype``; ``fp8_rows(data, scales, height, ids, dtype)`` rows ``ids`` (int32 or int64 ``[T]``, each
in ``[0, N)``). A weight is multiplied in float32 and rounded once.

Kernels turn e4m3 into float16 by moving its bits: with the exponent in float16's lowest four
exponent bits that is exactly the number by 256, subnormal or not, on every GPU. The codes of NaN
(0x7F and 0xFF), which no checkpoint holds, become 480 there.
"""

import torch
from torch import Tensor

from squall.kernels.cases import BF16, BOTH, Case
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.launch import kernel
from squall.kernels.op import op

BLOCK = 128  # columns that share a scale; rows too, in files


def blocks_of(size: int) -> int:
    """Blocks along a dimension; the last one may be cut."""
    return -(-size // BLOCK)


def check_weight(data: Tensor, scales: Tensor, height: int) -> None:
    """Assert that they are a weight."""
    assert data.dtype == torch.uint8, f"data {data.dtype}"
    assert scales.dtype == torch.float32, f"scales {scales.dtype}"
    assert height > 0, f"height {height}"
    assert BLOCK % height == 0, f"height {height}"
    wanted = -(-data.shape[0] // height), blocks_of(data.shape[1])
    assert scales.shape == wanted, f"data {data.shape}, height {height}, scales {scales.shape}"
    assert data.stride(1) == scales.stride(1) == 1, "rows must be dense"


def _dequantized(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """With a row of scales for every row of ``data``."""
    weights = data.view(torch.float8_e4m3fn).float()
    weights *= scales.repeat_interleave(BLOCK, 1)[:, : data.shape[1]]
    return weights.to(dtype)


def fp8_expand_reference(
    data: Tensor, scales: Tensor, height: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    rows = torch.arange(start, stop, device=data.device)
    return _dequantized(data[start:stop], scales[rows // height], dtype)


def fp8_rows_reference(
    data: Tensor, scales: Tensor, height: int, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    rows = ids.long()
    return _dequantized(data[rows], scales[rows // height], dtype)


@triton.jit
def e4m3(bits):  # type: ignore[no-untyped-def]
    """Codes in the lowest bytes of integers -> float16, by 256."""
    bits = bits.to(tl.int32)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)


@kernel(do_not_specialize=["start"])
def _fp8_expand_kernel(  # type: ignore[no-untyped-def]
    data_ptr,
    scales_ptr,
    ids_ptr,
    out_ptr,
    start,
    K,
    data_stride,
    scales_stride,
    HEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (rows of out, blocks of BLOCK_K columns)."""
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row + start
    if ids_ptr is not None:
        row = tl.load(ids_ptr + out_row).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = column < K
    data = data_ptr + row * data_stride + column
    bits = tl.load(data, mask=inside, other=0, eviction_policy="evict_first")
    scales = scales_ptr + (row // HEIGHT) * scales_stride + column // 128
    weight = e4m3(bits).to(tl.float32) * 256.0 * tl.load(scales, mask=inside, other=0.0)
    target = out_ptr + out_row * K + column
    tl.store(target, weight.to(out_ptr.dtype.element_ty), mask=inside)


def _expand(
    weight: tuple[Tensor, Tensor, int],
    ids: Tensor | None,
    start: int,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    data, scales, height = weight
    check_weight(data, scales, height)
    k = data.shape[1]
    out = torch.empty(rows, k, dtype=dtype, device=data.device)
    if rows:
        block = min(4096, next_power_of_2(k))
        _fp8_expand_kernel[(rows, -(-k // block))](
            data, scales, ids, out, start, k, data.stride(0), scales.stride(0), height, block,
            num_warps=max(1, block // 512),
        )  # fmt: skip
    return out


def fp8_expand_launcher(
    data: Tensor, scales: Tensor, height: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    assert 0 <= start <= stop <= data.shape[0], f"rows {start} to {stop} of {data.shape[0]}"
    return _expand((data, scales, height), None, start, stop - start, dtype)


def fp8_rows_launcher(
    data: Tensor, scales: Tensor, height: int, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    assert ids.dim() == 1, f"ids {ids.shape}"
    assert ids.is_contiguous(), "ids must be dense"
    return _expand((data, scales, height), ids, 0, ids.shape[0], dtype)


def _expand_fake(
    data: Tensor, scales: Tensor, height: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((stop - start, data.shape[1]), dtype=dtype)


def _rows_fake(
    data: Tensor, scales: Tensor, height: int, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((ids.shape[0], data.shape[1]), dtype=dtype)


fp8_expand = op(
    "fp8_expand(Tensor data, Tensor scales, int height, int start, int stop, ScalarType dtype)"
    " -> Tensor",
    fp8_expand_reference,
    fp8_expand_launcher,
    _expand_fake,
)
fp8_rows = op(
    "fp8_rows(Tensor data, Tensor scales, int height, Tensor ids, ScalarType dtype) -> Tensor",
    fp8_rows_reference,
    fp8_rows_launcher,
    _rows_fake,
)


def random_fp8(
    n: int, k: int, height: int, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``data`` with every code but NaN and ``scales`` that give weights of about N(0, 1 / K);
    ``generator`` belongs to ``device``."""
    data = torch.empty((n, k), dtype=torch.uint8, device=device)
    data.random_(0, 256, generator=generator)
    data[(data & 0x7F) == 0x7F] -= 1
    shape = -(-n // height), blocks_of(k)
    spread = torch.empty(shape, device=device).uniform_(0.5, 1.5, generator=generator)
    return data, spread / (100 * k**0.5)  # 100: the root mean square of all codes


def _weight(n: int, k: int, height: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    cpu = torch.device("cpu")
    data, scales = random_fp8(n, k, height, cpu, torch.Generator().manual_seed(61))
    return data.to(device), scales.to(device), height


def _expand_case(
    size: tuple[int, int], height: int, part: tuple[int, int], aot: tuple[torch.dtype, ...] = ()
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        return *_weight(*size, height, device), *part, dtype

    fns = fp8_expand, fp8_expand_reference, fp8_expand_launcher
    return Case(f"fp8_expand-{size[0]}x{size[1]}-{height}-{part}", *fns, build, aot=aot)


def _rows_case(ids: tuple[int, ...], height: int, index: torch.dtype) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        chosen = torch.tensor(ids, dtype=index, device=device)
        return *_weight(140, 330, height, device), chosen, dtype

    fns = fp8_rows, fp8_rows_reference, fp8_rows_launcher
    title = f"fp8_rows-{len(ids)}-{height}-{str(index).removeprefix('torch.')}"
    return Case(title, *fns, build, aot=BF16 * bool(ids))


CASES = (
    _expand_case((3, 4096), 128, (0, 3), BOTH),
    _expand_case((140, 200), 128, (0, 140)),
    _expand_case((140, 200), 128, (120, 133)),
    _expand_case((9, 77), 1, (0, 9)),
    _expand_case((40, 128), 16, (5, 5)),
    _rows_case((139, 0, 127, 128, 0), 128, torch.int64),
    _rows_case((33,), 2, torch.int32),
    _rows_case((), 128, torch.int64),
)
