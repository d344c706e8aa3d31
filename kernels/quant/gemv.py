"""Products of at most eight rows with quantised weights, by four-way byte products (dp4a):

    out = act(x W^T + bias)         plane_gemv
    stream += x W^T + bias          plane_gemv_add

``x`` comes as ``parts int8 [2, M, KP]``, ``scale float32 [M, KP / 32]``, ``sums int32 [M, KP / 16]``
(:mod:`squall.kernels.quant.activations`); W ``[N, K]`` as planes (:mod:`.planes`). ``out`` is
``[M, N]`` of any float dtype, ``stream`` float32 ``[M, N]``; rows may be strided. With ``activation``
"silu" or "gelu_tanh" W is ``[2F, K]``, gate rows then up rows, and ``out [M, F] = act(gate) * up``.
``bias`` is ``[N]`` or None.

A chunk is what 16 bytes of the low plane hold: ``8 / low_bits`` runs of 16 weights (one run a bit
field). Per run, with x16 the integers of x,

    y += xs * (scale * (dot(q, x16) - offset * sum(x16)) + minimum * sum(x16))

where dot and sum are exact in int32. At these sizes only the weights' bytes count, as long as the
instructions stay below them. So: a thread owns a chunk of each row of its program's tile and no
value crosses threads before the last sum; x is loaded and kept for all rows of the tile; scales come
as whole words; and everything a tile needs of the weights is in flight while the tile before is
worked on. The weights do not depend on the kernel before: with programmatic dependent launch
(``pdl``; Hopper and newer) the first tile is loaded while that kernel drains.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.activation import ACTIVATIONS
from squall.kernels.cases import BF16, BOTH, Case, random
from squall.kernels.lang import next_power_of_2, tl, triton
from squall.kernels.linear_epilogue import gate, weight_rows
from squall.kernels.op import multiprocessors, op
from squall.kernels.quant.activations import quantize_rows_reference, restore
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.planes import Layout, Planes, dequantize, layout, padded, random_planes
from squall.kernels.tuning import Config, Problem, Tunable, tuned

MAX_ROWS = 8

# Four words of one thread: the dot product with both parts of x, in the first of four results.
_DOT = tl.constexpr(
    "{ .reg .b32 t; "
    + "dp4a.s32.s32 t, $4, $8, 0; "
    + "".join(f"dp4a.s32.s32 t, ${i}, ${i + 4}, t; " for i in (5, 6, 7))
    + "shl.b32 t, t, 8; "
    + "".join(f"dp4a.s32.s32 t, ${i}, ${i + 8}, t; " for i in (4, 5, 6, 7))
    + "mov.b32 $0, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)


@triton.jit
def _dot(q, high, low, DP4A: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sum(q * (256 * high + low))`` over the bytes of four words: int32 ``[..., 4] -> [..., 1]``."""
    if DP4A:
        sums = tl.inline_asm_elementwise(
            _DOT, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r", [q, high, low], tl.int32, True, 4
        )
    else:
        sums = tl.zeros(high.shape, tl.int32) + q * 0
        for byte in tl.static_range(4):
            up: tl.constexpr = 24 - 8 * byte
            x = (((high << up) >> 24) << 8) + ((low << up) >> 24)
            sums += ((q << up) >> 24) * x
    return tl.sum(sums, axis=3, keep_dims=True)


@triton.jit
def _load(ptr, mask):  # type: ignore[no-untyped-def]
    """A part of a tile of weights; ``mask`` is None where all of it exists."""
    if mask is None:
        part = tl.load(ptr, eviction_policy="evict_first")
    else:
        part = tl.load(ptr, mask=mask, other=0, eviction_policy="evict_first")
    return part


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    row,
    blocks,
    start,
    mask,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Chunks ``start`` to ``start + THREADS`` of rows ``[1, R, 1, 1]``: ``[1, R, THREADS, words]`` each.

    SCALE_BITS are the bits of scales of 32 * 8 / LOW weights, a unit: two chunks. Without a high
    plane or super-scales the low words stand in for them, unused.
    """
    RUNS: tl.constexpr = 8 // LOW
    chunk = start + tl.arange(0, THREADS)[None, None, :, None]
    unit = chunk // 2
    word = tl.arange(0, 4)[None, None, None, :]
    low = _load(low_ptr + row * (blocks * (8 * LOW)) + (chunk * 4 + word), mask)
    high = low
    if HIGH > 0:
        SHARED: tl.constexpr = 8 // HIGH // RUNS
        place = (unit // SHARED) * 8 + (chunk % 2) * 4 + word
        high = _load(high_ptr + row * (blocks * (8 * HIGH)) + place, mask)
    WORDS: tl.constexpr = (SCALE_BITS + 31) // 32
    UNITS: tl.constexpr = 8 // RUNS  # of a block
    place = unit * WORDS + tl.arange(0, WORDS)[None, None, None, :]
    scales = _load(scales_ptr + row * (blocks * (UNITS * WORDS)) + place, mask)
    supers = low
    if supers_ptr is not None:
        supers = _load(supers_ptr + row * blocks + unit // UNITS, mask)
    return low, high, scales, supers


@triton.jit
def _half(bits):  # type: ignore[no-untyped-def]
    """The float16 in the low bits, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word(words, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``words[..., INDEX]`` as ``[1, R, T, 1]``; a thread has all words."""
    W: tl.constexpr = words.shape[3]
    if W > 1:
        words = tl.where(tl.arange(0, W)[None, None, None, :] == INDEX, words, 0)
        words = tl.sum(words, axis=3, keep_dims=True)
    return words


@triton.jit
def _run_scales(  # type: ignore[no-untyped-def]
    words, half, RUN: tl.constexpr, RUN_BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr
):
    """Scale and minimum of run number RUN of each chunk, float32 ``[1, R, T, 1]``, without super-scales.

    ``half`` ``[1, 1, T, 1]`` is 1 in the second chunk of a unit, whose run is a group of its own where
    groups are of 16 weights.
    """
    bits = _word(words, RUN * RUN_BITS // 32).to(tl.int32)
    SHIFT: tl.constexpr = RUN * RUN_BITS % 32
    bits >>= SHIFT
    if GROUP == 16:
        bits >>= half * (RUN_BITS // 2)
    if KIND == "byte_pair":
        return (bits & 255).to(tl.float32), ((bits >> 8) & 255).to(tl.float32)
    if KIND == "half_pair":
        return _half(bits), _half(bits >> 16)
    scale = _half(bits) if KIND == "half" else ((bits << 24) >> 24).to(tl.float32)
    return scale, scale


@triton.jit
def _run_quants(  # type: ignore[no-untyped-def]
    low, high, RUN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """The quants of run number RUN, one a byte; ``high`` is shifted to the chunk's own fields."""
    if LOW == 8:
        return low
    FIELD: tl.constexpr = 0x0F0F0F0F if LOW == 4 else 0x03030303
    q = (low >> (LOW * RUN)) & FIELD
    if HIGH > 0:
        BITS: tl.constexpr = (0x01010101 if HIGH == 1 else 0x03030303) << LOW
        if HIGH * RUN <= LOW:
            q = q | ((high << (LOW - HIGH * RUN)) & BITS)
        else:
            q = q | ((high >> (HIGH * RUN - LOW)) & BITS)
    return q


@triton.jit(do_not_specialize=["rows", "features", "blocks"])
def _plane_gemv_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    scale_ptr,
    sums_ptr,
    low_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    y_ptr,
    rows,
    features,
    blocks,
    y_stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of TILE weight rows,). ``features`` are columns of y, ``blocks`` is KP / 256;
    parts, low, high and scales are words of 32 bits (scales of Q8_0: 16). ROWS >= rows."""
    GATED: tl.constexpr = ACTIVATION != "none"
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    RUNS: tl.constexpr = 8 // LOW
    BYTE: tl.constexpr = 8 if KIND == "byte" else 16
    RUN_BITS: tl.constexpr = (32 if KIND == "half_pair" else BYTE) * (32 // GROUP)
    PAIRED: tl.constexpr = KIND == "byte_pair" or KIND == "half_pair"
    chunks = blocks * (2 * LOW)
    tile = tl.program_id(0)
    w_row = weight_rows(tile, features, TILE, GATED)
    index = tl.arange(0, THREADS)

    first = None if EVEN else (index < chunks)[None, None, :, None]
    low_1, high_1, scales_1, supers_1 = _load_tile(
        low_ptr, high_ptr, scales_ptr, supers_ptr, w_row[None, :, None, None], blocks, 0, first,
        LOW, HIGH, RUN_BITS * RUNS, THREADS,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    x_row = tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None, None, None]
    acc = tl.zeros([ROWS, TILE, THREADS, 1], tl.float32)
    for start in range(0, chunks, THREADS):
        low, high, scales, supers = low_1, high_1, scales_1, supers_1
        ahead = start + THREADS
        more = ahead < chunks if EVEN else (ahead + index < chunks)[None, None, :, None]
        low_1, high_1, scales_1, supers_1 = _load_tile(
            low_ptr, high_ptr, scales_ptr, supers_ptr, w_row[None, :, None, None], blocks, ahead, more,
            LOW, HIGH, RUN_BITS * RUNS, THREADS,
        )  # fmt: skip
        chunk = (start + index)[None, None, :, None]
        unit = chunk // 2
        # With % 2 the compiler would see two neighbouring sums, load them as one vector and move
        # them to other threads.
        half = chunk & 1
        x_mask = (chunk < chunks) & (x_row >= 0)
        if HIGH > 0:
            # Bring the chunk's own fields of the word that several chunks share to the bottom.
            high = high >> ((unit % (8 // HIGH // RUNS)) * (HIGH * RUNS))
        total = tl.zeros([ROWS, TILE, THREADS, 1], tl.float32)
        least = tl.zeros([ROWS, TILE, THREADS, 1], tl.float32)
        for run in tl.static_range(RUNS):
            place = unit * (8 * RUNS) + 8 * run + half * 4
            place = place + tl.arange(0, 4)[None, None, None, :] + x_row * (blocks * 64)
            x_high = tl.load(parts_ptr + place, mask=x_mask, other=0)
            x_low = tl.load(
                parts_ptr + rows * (blocks * 64) + place, mask=x_mask, other=0
            )
            xs = tl.load(
                scale_ptr + x_row * (blocks * 8) + (unit * RUNS + run), mask=x_mask, other=0.0
            )
            q = _run_quants(low, high, run, LOW, HIGH)
            dot = _dot(q, x_high, x_low, DP4A)
            if OFFSET > 0 or PAIRED:
                sums = tl.load(
                    sums_ptr + x_row * (blocks * 16) + (unit * (2 * RUNS) + 2 * run + half),
                    mask=x_mask,
                    other=0,
                )
            if OFFSET > 0:
                dot -= OFFSET * sums
            scale, minimum = _run_scales(scales, half, run, RUN_BITS, GROUP, KIND)
            total += (dot.to(tl.float32) * xs) * scale
            if PAIRED:
                least += (sums.to(tl.float32) * xs) * minimum
        if KIND == "byte_pair":
            both = _word(supers, 0)
            total = total * _half(both) - least * _half(both >> 16)
        elif KIND == "byte":
            total = total * _half(_word(supers, 0).to(tl.int32))
        elif KIND == "half_pair":
            total += least
        acc += total

    y = tl.sum(acc.reshape(ROWS, TILE, THREADS), axis=2)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    if GATED:
        z, up = tl.split(y.reshape(ROWS, 2, OUT).permute(0, 2, 1))
        y = gate(z, up, ACTIVATION)
    row = tl.arange(0, ROWS)
    feature = tile * OUT + tl.arange(0, OUT)
    target = y_ptr + row.to(tl.int64)[:, None] * y_stride + feature[None, :]
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    if ADD:
        y += tl.load(target, mask=mask, other=0.0)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


def _matrix(
    low: Tensor, high: Tensor | None, scales: Tensor, supers: Tensor | None, ggml_type: int
) -> Tensor:
    """float32 ``[N, KP]``."""
    in_features = low.shape[1] * 32 // layout(ggml_type).low_bits
    return dequantize(Planes(gguf_formats()[ggml_type], in_features, low, high, scales, supers))


def plane_gemv_reference(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    weights = _matrix(low, high, scales, supers, ggml_type)
    y = F.linear(restore((parts, scale, sums)), weights, None if bias is None else bias.float())
    out.copy_(ACTIVATIONS[activation](y))


def plane_gemv_add_reference(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    weights = _matrix(low, high, scales, supers, ggml_type)
    stream += F.linear(restore((parts, scale, sums)), weights, bias)


def key(ggml_type: int, n: int, k: int, bucket: int) -> str:
    """A problem's name in the tables of tuned parameters."""
    return f"{gguf_formats()[ggml_type].name.lower()}-n{n}-k{k}-m{bucket}"


def rule(features: int, chunks: int, gated: bool, device: torch.device) -> Config:
    """Launch parameters where no table has the problem.

    ``rows`` are weight rows of a program (gate and up together): the most, up to 4, that leave four
    programs for every multiprocessor. ``warps``: a tile must not be longer than a row.
    """
    weights = features * (2 if gated else 1)
    rows = 4 if weights // 4 >= 4 * multiprocessors(device) else 2
    return {"rows": rows, "warps": min(4, max(1, next_power_of_2(chunks) // 32)), "pdl": 0}


def candidates(bucket: int) -> Iterator[Config]:
    """Launch parameters worth measuring for ``bucket`` rows of x."""
    tiles = ((2, 4), (4, 2), (4, 4), (8, 1), (8, 2), (2, 8))
    if bucket == MAX_ROWS:  # eight sums a weight row: a tall tile has no registers left
        tiles = ((2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4))
    for rows, warps in tiles:
        for pdl in (0, 1):
            yield {"rows": rows, "warps": warps, "pdl": pdl}


def _has_dp4a(device: torch.device) -> bool:
    """NVIDIA's instruction: not in Triton's interpreter, not on other vendors' devices."""
    return device.type != "xpu" and torch.version.hip is None and not triton.knobs.runtime.interpret


def _as_words(scales: Tensor, bits: int) -> Tensor:
    """Scales as the kernel loads them: ``[N, words]`` of 16 or 32 bits."""
    return scales.view(scales.shape[0], -1).view(torch.int16 if bits == 16 else torch.int32)


def _gemv(
    quantized: tuple[Tensor, Tensor, Tensor],
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    add: bool = False,
    config: Config | None = None,
) -> None:
    """Launch; ``config`` overrides the table (tuning)."""
    (parts, scale, sums), (low, high, scales, supers) = quantized, planes
    plan, gated = layout(ggml_type), activation != "none"
    (rows, features), (n, width) = out.shape, low.shape
    k = width * 32 // plan.low_bits
    assert parts.shape == (2, rows, k), f"parts {parts.shape} for {rows} rows of {k}"
    assert rows <= MAX_ROWS, f"{rows} rows; at most {MAX_ROWS} are supported"
    assert n == features * (1 + gated), f"{n} weight rows for out {out.shape}, {activation}"
    assert activation in ACTIVATIONS, activation
    assert bias is None or bias.shape == (n,), f"bias {bias.shape} for {n} rows"
    assert out.stride(1) == 1, "rows of out must be dense"
    if rows == 0:
        return
    bucket, chunks = next_power_of_2(rows), width // 4
    if config is None:
        config = tuned("plane_gemv", key(ggml_type, n, k, bucket), low.device)
    if config is None:
        config = rule(features, chunks, gated, low.device)
    tile, warps, pdl = config["rows"], config["warps"], bool(config["pdl"])
    launch = {"launch_pdl": True} if pdl else {}
    _plane_gemv_kernel[(-(-features // (tile // 2 if gated else tile)),)](
        parts.view(torch.int32),
        scale,
        sums,
        low,
        high,
        _as_words(scales, 16 if plan.low_bits == 8 else 32),
        None if supers is None else _as_words(supers, 32 if plan.paired else 16),
        bias,
        out,
        rows,
        features,
        k // 256,
        out.stride(0),
        plan.low_bits,
        plan.high_bits,
        plan.offset,
        plan.group,
        plan.scales,
        activation,
        add,
        bucket,
        tile,
        32 * warps,
        chunks % (32 * warps) == 0,
        _has_dp4a(low.device),
        pdl,
        num_warps=warps,
        **launch,
    )


def plane_gemv_launcher(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    planes = (low, high, scales, supers)
    _gemv((parts, scale, sums), planes, ggml_type, bias, activation, out)


def plane_gemv_add_launcher(
    parts: Tensor,
    scale: Tensor,
    sums: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    supers: Tensor | None,
    ggml_type: int,
    bias: Tensor | None,
    stream: Tensor,
) -> None:
    assert stream.dtype == torch.float32, f"stream {stream.dtype}"
    planes = (low, high, scales, supers)
    _gemv((parts, scale, sums), planes, ggml_type, bias, "none", stream, add=True)


def _fake(*_arguments: object) -> None:
    return None


_INPUTS = (
    "Tensor parts, Tensor scale, Tensor sums, Tensor low, Tensor? high, Tensor scales,"
    " Tensor? supers, int ggml_type, Tensor? bias"
)
plane_gemv = op(
    f"plane_gemv({_INPUTS}, str activation, Tensor(a!) out) -> ()",
    plane_gemv_reference,
    plane_gemv_launcher,
    _fake,
)
plane_gemv_add = op(
    f"plane_gemv_add({_INPUTS}, Tensor(a!) stream) -> ()",
    plane_gemv_add_reference,
    plane_gemv_add_launcher,
    _fake,
)

_TYPES = {entry.name: entry for entry in gguf_formats().values() if entry.unpack is not None}


def _inputs(
    name: str, size: tuple[int, int, int], bias: bool, device: torch.device
) -> tuple[object, ...]:
    """Arguments up to ``bias`` for M, N, K."""
    m, n, k = size
    entry, cpu = _TYPES[name], torch.device("cpu")
    planes = random_planes(entry, n, k, cpu, torch.Generator().manual_seed(41))
    x = random((m, k), torch.float32, cpu, 42)
    tensors = (*quantize_rows_reference(x, padded(k)), *planes.tensors)
    moved = [None if t is None else t.to(device) for t in tensors]
    return *moved, entry.ggml_type, random((n,), torch.float32, device, 43) if bias else None


def _case(
    name: str,
    size: tuple[int, int, int],
    activation: str = "none",
    bias: bool = False,
    aot: tuple[torch.dtype, ...] = (),
) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        features = size[1] // (1 if activation == "none" else 2)
        out = torch.full((size[0], features + 3), torch.nan, dtype=dtype, device=device)[:, 3:]
        return *_inputs(name, size, bias, device), activation, out

    title = f"plane_gemv-{name}-{'x'.join(map(str, size))}-{activation}{'-bias' * bias}"
    fns = plane_gemv, plane_gemv_reference, plane_gemv_launcher
    return Case(title, *fns, build, mutates=(10,), aot=aot)


def _add_case(name: str, size: tuple[int, int, int], bias: bool = False) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        stream = random(size[:2], torch.float32, device, 44)
        return *_inputs(name, size, bias, device), stream

    title = f"plane_gemv_add-{name}-{'x'.join(map(str, size))}{'-bias' * bias}"
    fns = plane_gemv_add, plane_gemv_add_reference, plane_gemv_add_launcher
    return Case(title, *fns, build, mutates=(9,), aot=BF16 * (size[0] == 1))


def _cases() -> Iterator[Case]:
    for name, entry in _TYPES.items():
        yield _case(name, (1, 6, 4096), aot=BF16)
        yield _case(name, (8, 5, 4096), aot=BF16)
        yield _case(name, (3, 13, 768), bias=True)
        if entry.block_size == 32:
            yield _case(name, (2, 4, 1056))
    for activation in ("silu", "gelu_tanh"):
        yield _case("Q4_K", (1, 12, 2048), activation, aot=BOTH)
        yield _case("Q6_K", (5, 10, 512), activation, bias=True)
    for name, size in (("Q4_K", (1, 9, 14336)), ("Q6_K", (1, 9, 2048)), ("Q8_0", (4, 7, 288))):
        yield _add_case(name, size, bias=name == "Q8_0")


CASES = tuple(_cases())
