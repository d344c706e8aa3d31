"""Block-quantised weight formats: how stored bytes become numbers.

A format cuts every row of a weight matrix into blocks of ``block_size`` weights, each stored in
``block_bytes`` bytes. All formats here are *affine by group*: with ``g`` the group of weight ``i``,

    weight[i] = q[i] * scale[g] + minimum[g]

where ``q`` is a small integer. A format module therefore only says how to take a block apart
(``unpack``); dequantisation and the view that CPU and GPU kernels repack from are built on that.

Every product ``q * scale`` of the GGML formats fits in 24 bits and is exact in float32, so a weight
is rounded once, by the addition, whether or not the device fuses the two operations.

A module ``gguf_*.py`` beside this one is found by its file name and offers
``FORMATS: tuple[QuantFormat, ...]``.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Unpacked(NamedTuple):
    """``N`` blocks taken apart; ``G`` groups a block."""

    q: Tensor  # uint8 or int8 [N, block_size]
    scale: Tensor  # float32 [N, G]
    minimum: Tensor | None  # float32 [N, G]; None: zero everywhere


class Affine(NamedTuple):
    """Weights as ``q * scale + minimum`` by group of ``group`` neighbours; ``n`` weights a row."""

    q: Tensor  # uint8 or int8 [..., n]
    scale: Tensor  # float32 [..., n / group]
    minimum: Tensor  # float32 [..., n / group]
    group: int


@dataclass(frozen=True)
class QuantFormat:
    """One weight format.

    ``unpack`` takes uint8 ``[N, block_bytes]`` (contiguous, four-byte aligned when
    ``block_bytes`` is a multiple of four); it is None for the dense formats, which have
    ``dtype``.

    ``q`` of a symmetric format (``signed``) is int8 in ``[-2**(bits-1), 2**(bits-1) - 1]`` and its
    minimum is zero; otherwise ``q`` is uint8 in ``[0, 2**bits - 1]``.
    """

    name: str  # as GGML spells it: "Q4_K"
    ggml_type: int  # code in GGUF files
    block_size: int  # weights
    block_bytes: int
    bits: int  # of one q; of one number in dense formats
    group: int  # weights that share a scale; 1 in dense formats
    signed: bool
    unpack: Callable[[Tensor], Unpacked] | None = None
    dtype: torch.dtype | None = None

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of ``weights`` weights, a multiple of ``block_size``."""
        assert weights % self.block_size == 0, (self.name, weights)
        return weights // self.block_size * self.block_bytes

    def dequantize(self, blocks: Tensor) -> Tensor:
        """uint8 ``[..., n_blocks * block_bytes]`` -> float32 ``[..., n_blocks * block_size]``.

        A new tensor. Equals the ``gguf`` package's ``quants.dequantize`` bit for bit (but for the
        signs and payloads of NaNs).
        """
        shape = self._weights_shape(blocks)
        if self.unpack is None:
            assert self.dtype is not None
            return self._blocks(blocks).view(self.dtype).to(torch.float32, copy=True).view(shape)
        q, scale, minimum = self.unpack(self._blocks(blocks))
        weights = q.float().view(*scale.shape, self.group)
        weights.mul_(scale.unsqueeze(-1))
        if minimum is not None:
            weights.add_(minimum.unsqueeze(-1))
        return weights.view(shape)

    def affine(self, blocks: Tensor) -> Affine:
        """Take uint8 ``[..., n_blocks * block_bytes]`` apart without multiplying out.

        ``q.float() * scale + minimum`` equals ``dequantize``. ValueError for a dense format.
        """
        if self.unpack is None:
            raise ValueError(f"{self.name} holds plain numbers: it has no scales")
        shape = self._weights_shape(blocks)
        q, scale, minimum = self.unpack(self._blocks(blocks))
        groups = (*shape[:-1], shape[-1] // self.group)
        if minimum is None:
            minimum = torch.zeros_like(scale)
        return Affine(q.view(shape), scale.reshape(groups), minimum.reshape(groups), self.group)

    def _weights_shape(self, blocks: Tensor) -> tuple[int, ...]:
        assert blocks.dtype == torch.uint8, blocks.dtype
        count, rest = divmod(blocks.shape[-1], self.block_bytes)
        assert rest == 0, f"{self.name}: rows of {blocks.shape[-1]} bytes"
        return (*blocks.shape[:-1], count * self.block_size)

    def _blocks(self, blocks: Tensor) -> Tensor:
        """``[N, block_bytes]``, contiguous and aligned for views of up to four bytes an element."""
        flat = blocks.reshape(-1, self.block_bytes)
        unit = self.block_bytes & -self.block_bytes  # largest power of two that divides it
        return flat.clone() if flat.storage_offset() % min(unit, 4) else flat


def half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at byte ``offset`` (even) of each block ``[N, bytes]``: float32 ``[N, 1]``."""
    part = blocks[:, offset : offset + 2].view(torch.int16)
    return part.contiguous().view(torch.float16).float()


def half_pair(blocks: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Two neighbouring float16 values, the first at byte ``offset``: two float32 ``[N, 1]``.

    ``offset`` and the size of a block are multiples of four: gathering a pair as one 32-bit word
    takes a CPU a fraction of the time of two strided conversions.
    """
    part = blocks[:, offset : offset + 4].view(torch.int32)
    pair = part.contiguous().view(torch.float16).float()
    return pair[:, :1], pair[:, 1:]


def bit_fields(packed: Tensor, width: int, bit: int = 0) -> Tensor:
    """uint8 ``[N, C, W]`` -> uint8 ``[N, C * (8 / width) * W]``: chunk by chunk, field by field.

    Field ``k`` of a byte is its bits ``k * width`` to ``(k + 1) * width - 1``; it is moved to bit
    ``bit`` of the result.
    """
    count, chunks, length = packed.shape
    fields = 8 // width
    out = packed.new_empty(count, chunks, fields, length)
    for k in range(fields):
        shift = k * width - bit
        out[:, :, k] = packed >> shift if shift >= 0 else packed << -shift
    return out.bitwise_and_(((1 << width) - 1) << bit).view(count, -1)


@functools.cache
def gguf_formats() -> Mapping[int, QuantFormat]:
    """Formats that GGUF tensors may have, by GGML type code: every ``gguf_*.py`` of this folder."""
    package = __name__.rpartition(".")[0]
    formats: dict[int, QuantFormat] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("gguf_"):
            for entry in importlib.import_module(f"{package}.{module.name}").FORMATS:
                assert entry.ggml_type not in formats, f"two formats with code {entry.ggml_type}"
                formats[entry.ggml_type] = entry
    return MappingProxyType(dict(sorted(formats.items())))
