"""Planes: how block-quantised weights lie on a GPU.

A GGUF row interleaves scales and quants in blocks of 18 to 210 bytes, which allow loads of two or
four bytes. Here every field is a matrix of its own, ``[N, ...]`` row-major, each row padded with
zeros from K weights to KP, a multiple of 256. Nothing is rounded: ``dequantize`` gives the bits
that ``QuantFormat.dequantize`` gives for the file's bytes.

**Quants** are stored as ``q + offset``, not negative (Q8_0: int8 as it is; MXFP4: as their codes),
and split into planes of little-endian int32 words. A plane of w bits cuts a row into units of
``8 / w`` runs of 32 weights; a unit is 8 words, and bits ``w * t`` of byte b of its word j belong
to weight ``32 * t + 4 * j + b`` of the unit:

    low    4 bits  int32 [N, KP / 8]     the low 4 bits of all formats but these:
           2 bits  int32 [N, KP / 16]    Q2_K, Q3_K
           8 bits  int32 [N, KP / 4]     Q8_0
    high   2 bits  int32 [N, KP / 16]    bits 4 and 5 of Q6_K
           1 bit   int32 [N, KP / 32]    bit 4 of Q5_0, Q5_1, Q5_K; bit 2 of Q3_K

This is GGML's own order in the K formats. Masking a word gives four consecutive weights, which is
what a four-way byte product (dp4a) takes; words of the low plane meet words of the high plane with
the same j, and no bits cross bytes.

**Scales**, by group of G = 16 or 32 weights:

    "half"       scales f16 [N, KP / G]: d                   weight = d * (q - offset)
    "half_pair"  scales f16 [N, KP / G, 2]: d, m             weight = d * q + m
    "byte"       scales int8 [N, KP / G]: s                  weight = d * s * (q - offset)
                 supers f16 [N, KP / 256]: d
    "byte_pair"  scales uint8 [N, KP / G, 2]: s, m           weight = d * s * q - dmin * m
                 supers f16 [N, KP / 256, 2]: d, dmin
    "power"      scales uint8 [N, KP / G]: e             weight = 2^(e - 128) * CODES[q]

The 4- and 6-bit fields of the K formats are widened to bytes: 2.8% more memory in Q4_K.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from squall.kernels.quant.base import QuantFormat, bit_fields, gguf_formats
from squall.kernels.quant.gguf_mxfp4 import CODES, powers

SUPER = 256  # weights that share a super-scale; rows are padded to a multiple of it
# Weights that pack() takes apart at a time: about 160 MiB of scratch.
_CHUNK_WEIGHTS = 32 << 20


@dataclass(frozen=True)
class Layout:
    """What a kernel must know of a format; see the module's docstring."""

    low_bits: int  # 4, 2 or 8
    high_bits: int  # 0, 1 or 2; a bit's place in q is above the low plane's
    offset: int
    group: int
    scales: str  # "half", "half_pair", "byte", "byte_pair" or "power"
    top: int = 0  # largest scale in bytes
    supers: int | None = None  # byte of a GGUF block where d (and dmin) are
    codes: tuple[int, ...] = ()  # integers that stored quants stand for, if not for themselves

    @property
    def paired(self) -> bool:
        """Groups have a minimum beside their scale."""
        return self.scales.endswith("pair")

    @property
    def bits(self) -> float:
        """Of memory for a weight, scales included."""
        number = 16 if self.scales.startswith("half") else 8
        pair = 1 + self.paired
        supers = 0.0 if self.supers is None else 16 * pair / SUPER
        return self.low_bits + self.high_bits + number * pair / self.group + supers


_LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "Q4_0": Layout(4, 0, 8, 32, "half"),
        "Q4_1": Layout(4, 0, 0, 32, "half_pair"),
        "Q5_0": Layout(4, 1, 16, 32, "half"),
        "Q5_1": Layout(4, 1, 0, 32, "half_pair"),
        "Q8_0": Layout(8, 0, 0, 32, "half"),
        "Q2_K": Layout(2, 0, 0, 16, "byte_pair", top=15, supers=80),
        "Q3_K": Layout(2, 1, 4, 16, "byte", top=31, supers=108),
        "Q4_K": Layout(4, 0, 0, 32, "byte_pair", top=63, supers=0),
        "Q5_K": Layout(4, 1, 0, 32, "byte_pair", top=63, supers=0),
        "Q6_K": Layout(4, 2, 32, 16, "byte", top=127, supers=208),
        "MXFP4": Layout(4, 0, 0, 32, "power", codes=CODES),
    }
)


@functools.cache
def layout(ggml_type: int) -> Layout:
    """The layout of a GGML type; ``ValueError`` for types that have no planes."""
    entry = gguf_formats().get(ggml_type)
    if entry is None or entry.name not in _LAYOUTS:
        what = f"GGML type {ggml_type}" if entry is None else entry.name
        raise ValueError(f"{what} has no planes; accepted: {', '.join(_LAYOUTS)}")
    return _LAYOUTS[entry.name]


def padded(in_features: int) -> int:
    """KP: columns of a row in memory."""
    return -(-in_features // SUPER) * SUPER


Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""low, high, scales, supers: the order in which operators take them."""


@dataclass(frozen=True)
class Planes:
    """One weight matrix ``[N, K]``; tensors as in the module's docstring, contiguous."""

    format: QuantFormat
    in_features: int  # K, before padding
    low: Tensor
    high: Tensor | None
    scales: Tensor
    supers: Tensor | None

    @property
    def out_features(self) -> int:
        return self.low.shape[0]

    @property
    def padded(self) -> int:
        return padded(self.in_features)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t is not None)

    @property
    def tensors(self) -> Tensors:
        return self.low, self.high, self.scales, self.supers

    def select(self, ids: Tensor) -> "Planes":
        """Rows ``ids`` (int64 [N])."""
        high = None if self.high is None else self.high[ids]
        supers = None if self.supers is None else self.supers[ids]
        return replace(self, low=self.low[ids], high=high, scales=self.scales[ids], supers=supers)


def _empty(entry: QuantFormat, out_features: int, in_features: int, device: torch.device) -> Planes:
    """Planes with every padding column zero; the rest is not initialised."""
    if in_features % entry.block_size:
        raise ValueError(
            f"{entry.name} rows of {in_features} weights; accepted: multiples of {entry.block_size}"
        )
    plan, width = layout(entry.ggml_type), padded(in_features)
    new = torch.empty if width == in_features else torch.zeros

    def plane(bits: int) -> Tensor:
        return new(out_features, width * bits // 32, dtype=torch.int32, device=device)

    def grouped(group: int, dtype: torch.dtype) -> Tensor:
        pair = (2,) if plan.paired else ()
        return new(out_features, width // group, *pair, dtype=dtype, device=device)

    kinds = {"byte": torch.int8, "byte_pair": torch.uint8, "power": torch.uint8}
    return Planes(
        entry,
        in_features,
        plane(plan.low_bits),
        plane(plan.high_bits) if plan.high_bits else None,
        grouped(plan.group, kinds.get(plan.scales, torch.float16)),
        grouped(SUPER, torch.float16) if plan.supers is not None else None,
    )


def _words(q: Tensor, bits: int) -> Tensor:
    """uint8 ``[n, KP]``, of which only the low ``bits`` count -> int32 ``[n, KP * bits / 32]``."""
    if bits == 8:
        return q.view(torch.int32)
    fields = 8 // bits
    runs = (q & ((1 << bits) - 1)).view(q.shape[0], -1, fields, 32)
    packed = runs[:, :, 0].clone()
    for t in range(1, fields):
        packed |= runs[:, :, t] << (bits * t)
    return packed.view(q.shape[0], -1).view(torch.int32)


def _take_supers(blocks: Tensor, byte: int, count: int) -> Tensor:
    """Take ``count`` float16 out of uint8 blocks ``[..., block_bytes]`` and leave ones instead.

    What a format unpacks then are the scales' own integers.
    """
    place = blocks[..., byte : byte + 2 * count]
    supers = place.clone(memory_format=torch.contiguous_format).view(torch.float16)
    place[..., 0::2], place[..., 1::2] = 0x00, 0x3C
    return supers


def pack(entry: QuantFormat, raw: Tensor) -> Planes:
    """Planes of ``raw``, uint8 ``[N, row_bytes]`` as in the file, on its device.

    ``ValueError``: a type without planes, or rows that are not whole blocks.
    """
    plan = layout(entry.ggml_type)
    blocks_a_row, rest = divmod(raw.shape[-1], entry.block_bytes)
    if raw.dtype != torch.uint8 or raw.dim() != 2 or rest:
        raise ValueError(
            f"{entry.name} weights are {raw.dtype} {list(raw.shape)}; "
            f"accepted: uint8 [rows, a multiple of {entry.block_bytes}]"
        )
    planes = _empty(entry, raw.shape[0], blocks_a_row * entry.block_size, raw.device)
    step = max(1, _CHUNK_WEIGHTS // max(1, planes.padded))
    for start in range(0, raw.shape[0], step):
        _pack_rows(planes, plan, raw[start : start + step], start)
    return planes


def _pack_rows(planes: Planes, plan: Layout, raw: Tensor, start: int) -> None:
    entry, k = planes.format, planes.in_features
    rows = slice(start, start + raw.shape[0])
    if plan.supers is not None:
        assert planes.supers is not None, entry.name
        raw = raw.contiguous().clone()
        blocks = raw.view(raw.shape[0], -1, entry.block_bytes)
        supers = _take_supers(blocks, plan.supers, 1 + plan.paired)
        planes.supers[rows] = supers.view(planes.supers[rows].shape)
    q, scale, minimum, _ = entry.affine(raw)
    q = q.view(torch.uint8)
    if plan.codes:
        q = _codes(q, plan.codes)
    elif plan.offset:
        q += plan.offset  # modulo 256: int8 -8 becomes 0
    if planes.padded != k:
        q = torch.nn.functional.pad(q, (0, planes.padded - k))
    planes.low[rows] = _words(q, plan.low_bits)
    if planes.high is not None:
        planes.high[rows] = _words(q >> plan.low_bits, plan.high_bits)
    target = planes.scales[rows, : scale.shape[1]]
    if plan.paired:
        target[..., 0] = scale
        # The K formats subtract their minimum; unpacking has negated it.
        target[..., 1] = minimum.neg() if plan.supers is not None else minimum
    elif plan.scales == "power":
        target.copy_(scale.frexp().exponent + 127)  # frexp gives a half times a power
    else:
        target.copy_(scale)


def _codes(q: Tensor, codes: tuple[int, ...]) -> Tensor:
    """The first code of each of the int8 in uint8 ``q``: uint8."""
    code_of = {number & 255: code for code, number in reversed([*enumerate(codes)])}
    table = torch.tensor([code_of.get(byte, 0) for byte in range(256)], dtype=torch.uint8)
    return table.to(q.device)[q.int()]


def quants(planes: Planes) -> Tensor:
    """uint8 ``[N, KP]``, still with the offset; int8 for Q8_0 and MXFP4."""
    plan, rows, width = layout(planes.format.ggml_type), planes.out_features, planes.padded
    if plan.low_bits == 8:
        return planes.low.view(torch.int8)
    if rows == 0:
        return planes.low.new_empty((0, width), dtype=torch.uint8)

    def fields(words: Tensor, bits: int, place: int) -> Tensor:
        return bit_fields(words.view(torch.uint8).view(rows, -1, 32), bits, place)

    q = fields(planes.low, plan.low_bits, 0)
    if planes.high is not None:
        q |= fields(planes.high, plan.high_bits, plan.low_bits)
    if plan.codes:
        return torch.tensor(plan.codes, dtype=torch.int8, device=q.device)[q.int()]
    return q


def affine(planes: Planes) -> tuple[Tensor, Tensor | None]:
    """Scales and minimums, float32 ``[N, KP / group]``; weight = scale * (q - offset) + minimum."""
    if layout(planes.format.ggml_type).scales == "power":
        return powers(planes.scales), None
    scale = planes.scales.float()
    if planes.supers is not None:
        supers = planes.supers.float()
        per_super = scale.shape[1] // supers.shape[1]
        scale *= supers.repeat_interleave(per_super, 1)
    if scale.dim() == 2:
        return scale, None
    return scale[..., 0], scale[..., 1] if planes.supers is None else -scale[..., 1]


def dequantize(planes: Planes) -> Tensor:
    """float32 ``[N, K]``, the bits that ``format.dequantize`` gives."""
    plan = layout(planes.format.ggml_type)
    scale, minimum = affine(planes)
    q = quants(planes).float().sub_(plan.offset)
    weights = q.view(*scale.shape, plan.group).mul_(scale.unsqueeze(-1))
    if minimum is not None:
        weights.add_(minimum.unsqueeze(-1))
    return weights.view(planes.out_features, planes.padded)[:, : planes.in_features].contiguous()


def random_planes(
    entry: QuantFormat,
    out_features: int,
    in_features: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Planes:
    """Planes of random weights of about N(0, 0.02), made where they will be used.

    ``generator`` belongs to ``device``. Quants take every value, scales vary by group.
    """
    planes = _empty(entry, out_features, in_features, device)
    plan = layout(entry.ggml_type)
    for words in (planes.low, planes.high):
        if words is not None:
            words.random_(-(2**31), 2**31, generator=generator)
    levels = 2**entry.bits
    step = 0.02 * math.sqrt(12) / levels  # between neighbouring levels; uniform quants
    groups = planes.scales[:, : in_features // plan.group]
    spread = torch.empty(groups.shape[:2], device=device).uniform_(0.5, 1.5, generator=generator)
    centre = (levels - 1) / 2
    if plan.codes:
        size = math.sqrt(sum(number**2 for number in plan.codes) / len(plan.codes))
        groups.copy_((spread * (0.02 / size)).log2().round() + 128)
    elif planes.supers is None:
        if plan.paired:
            groups[..., 0] = spread * step
            groups[..., 1] = spread * (-step * centre)
        else:
            groups.copy_(spread * step)
    elif plan.paired:
        groups[..., 0] = spread * (plan.top / 1.5)
        groups[..., 1] = (spread * (plan.top / 1.5) + 1.5).clamp(0, plan.top)
        planes.supers[..., 0] = step / (plan.top / 1.5)
        planes.supers[..., 1] = step / (plan.top / 1.5) * centre
    else:
        sign = torch.empty_like(spread).uniform_(-1, 1, generator=generator).sign()
        groups.copy_(sign * spread * (plan.top / 1.5))
        planes.supers.fill_(step / (plan.top / 1.5))
    return planes


def concat(parts: Sequence[Planes]) -> Planes:
    """Matrices of one format and one number of columns, stacked along N."""
    first = parts[0]
    assert all(p.format == first.format for p in parts), [p.format.name for p in parts]
    assert all(p.in_features == first.in_features for p in parts), [p.in_features for p in parts]
    columns = zip(*(p.tensors for p in parts), strict=True)
    low, high, scales, supers = (
        None if column[0] is None else torch.cat([t for t in column if t is not None])
        for column in columns
    )
    assert low is not None
    assert scales is not None
    return Planes(first.format, first.in_features, low, high, scales, supers)


@functools.cache
def tuning_key(ggml_type: int, n: int, k: int, bucket: int) -> str:
    """A problem's name in the tables of tuned parameters."""
    return f"{gguf_formats()[ggml_type].name.lower()}-n{n}-k{k}-m{bucket}"
