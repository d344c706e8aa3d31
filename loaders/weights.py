"""Weight sources over model files: each tensor is read once, checked, and put on the device."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from squall.kernels.moe.experts import (
    BlockExperts,
    DenseExperts,
    Experts,
    Fp8Experts,
    place_experts,
)
from squall.kernels.moe.fp8 import row_height
from squall.kernels.quant.base import QuantFormat, gguf_formats
from squall.kernels.quant.fp8 import blocks_of
from squall.kernels.quant.fp8_weight import Fp8Weight
from squall.kernels.weight import BlockWeight, DenseWeight, Weight, merge, place
from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_names import NAME_MAPS, unpermute_rows
from squall.loaders.mxfp4 import gate_then_up, read_experts
from squall.loaders.progress import Advance
from squall.loaders.safetensors import DTYPES, SafetensorsFolder
from squall.models.config import MoEConfig

# Tensors older exporters left in checkpoints; they can be derived and no model reads them.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_IN_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
_MXFP4 = 39  # GGML's number of the type
_MAX_NAMED = 3  # unused tensors named in an error


class _FileWeights:
    """What the sources share: where weights go, and which tensors have been used."""

    def __init__(self, dtype: torch.dtype, device: torch.device, advance: Advance) -> None:
        self.dtype = dtype
        self.device = device
        self._advance = advance
        self._used: set[str] = set()

    def _place(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        self._advance(data.nbytes)
        return data.to(device=self.device, dtype=dtype)

    def _check_used(self, names: set[str], file: str) -> None:
        unused = sorted(names - self._used)
        if unused:
            more = f" and {len(unused) - _MAX_NAMED} more" if len(unused) > _MAX_NAMED else ""
            listed = ", ".join(unused[:_MAX_NAMED])
            raise ModelLoadError(f"{file}: the architecture does not use {listed}{more}")


def _check_shape(file: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ModelLoadError(
            f"{file}: tensor {name} has shape {list(found)}, expected {list(expected)}"
        )


class SafetensorsWeights(_FileWeights):
    """Weights of a safetensors folder."""

    def __init__(
        self,
        folder: SafetensorsFolder,
        dtype: torch.dtype,
        device: torch.device,
        advance: Advance,
    ) -> None:
        super().__init__(dtype, device, advance)
        self._folder = folder

    def _read(
        self, name: str, shape: tuple[int, ...], accepted: str = "F64, F32, F16, BF16"
    ) -> Tensor:
        data = self._folder.tensor(name)
        _check_shape(str(self._folder.path(name)), name, tuple(data.shape), shape)
        if data.dtype not in {DTYPES[kind] for kind in accepted.split(", ")}:
            raise ModelLoadError(
                f"{self._folder.path(name)}: tensor {name} is {data.dtype}, accepted: {accepted}"
            )
        self._used.add(name)
        return data

    def vector(self, name: str, size: int) -> Tensor:
        return self._place(self._read(name, (size,)), self.dtype)

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        return self._place(self._read(name, (size,)), torch.float32) + offset

    def head_norms(self, name: str, heads: int, dim: int) -> Tensor:
        """From one tensor (Command-R), or from one for each head (StableLM)."""
        if f"{name}.norms.0.weight" not in self._folder:
            return self._place(self._read(f"{name}.weight", (heads, dim)), torch.float32)
        rows = [self._read(f"{name}.norms.{i}.weight", (dim,)) for i in range(heads)]
        return self._place(torch.stack(rows), torch.float32)

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        shape = (out_features, in_features)
        if self._is_fp8(name):
            return self._fp8(name, shape)
        return DenseWeight(self._place(self._read(name, shape), self.dtype))

    def _is_fp8(self, name: str) -> bool:
        return self._folder.info(name).dtype == torch.float8_e4m3fn

    def _fp8(self, name: str, shape: tuple[int, int]) -> Fp8Weight:
        """An FP8 matrix and its scales, ``<name>_scale_inv``."""
        path, scales_name = self._folder.path(name), f"{name}_scale_inv"
        if scales_name not in self._folder:
            raise ModelLoadError(f"{path}: tensor {name} is F8_E4M3, but {scales_name} is missing")
        data = self._read(name, shape, accepted="F8_E4M3").view(torch.uint8)
        blocks = blocks_of(shape[0]), blocks_of(shape[1])
        scales = self._read(scales_name, blocks, accepted="F32, F16, BF16")
        placed = self._place(data, torch.uint8), self._place(scales, torch.float32)
        return Fp8Weight(*placed, self.dtype)

    def skip(self, name: str) -> None:
        self._used.add(name)

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._place(self._read(name, shape), torch.float32)

    def experts(self, prefix: str, moe: MoEConfig, hidden: int) -> Experts:
        count, inner = moe.experts, moe.intermediate_size
        up, down = [prefix + name for name in moe.gate_up], [prefix + moe.down]
        if "{}" in up[0] and self._is_fp8(up[0].format(0)):
            assert moe.biases is None, moe.biases
            gate_up_codes = self._fp8_stack(up, count, 2 * inner, hidden, row_height(inner))
            down_codes = self._fp8_stack(down, count, hidden, inner, row_height(hidden))
            return Fp8Experts(*gate_up_codes, *down_codes, self.dtype)
        up_bias = down_bias = None
        if moe.biases is not None:
            names = [prefix + name for name in moe.biases]
            up_bias = _in_order(self._stacked(names[0], count, 2 * inner), moe.interleaved)
            down_bias = self._stacked(names[1], count, hidden)
        if f"{up[0]}_blocks" in self._folder:
            gate_up = _in_order(self._mxfp4(up[0], (count, 2 * inner, hidden)), moe.interleaved)
            form = gguf_formats()[_MXFP4]
            blocks = (form, gate_up), (form, self._mxfp4(down[0], (count, hidden, inner)))
            return place_experts(
                BlockExperts(blocks[:1], up_bias, blocks[1], down_bias, self.dtype)
            )
        gate_up = _in_order(self._stack(up, count, 2 * inner, hidden, moe), moe.interleaved)
        return DenseExperts(
            gate_up, up_bias, self._stack(down, count, hidden, inner, moe), down_bias
        )

    def _mxfp4(self, name: str, shape: tuple[int, int, int]) -> Tensor:
        """A stack of experts as GGUF's blocks of MXFP4, uint8 ``[experts, rows, row bytes]``."""
        self._used.update((f"{name}_blocks", f"{name}_scales"))
        return self._place(read_experts(self._folder, name, shape), torch.uint8)

    def _stack(
        self, names: list[str], count: int, rows: int, in_features: int, moe: MoEConfig
    ) -> Tensor:
        """The tensors ``names`` of all experts, one below the other in each of them:
        ``[count, rows, in_features]``."""
        if "{}" not in names[0]:
            assert len(names) == 1, names
            if moe.transposed:
                return (
                    self._stacked(names[0], count, in_features, rows).transpose(1, 2).contiguous()
                )
            return self._stacked(names[0], count, rows, in_features)
        data = torch.empty((count, rows, in_features), dtype=self.dtype, device=self.device)
        places = data.view(count, len(names), -1, in_features)
        for expert, (i, name) in itertools.product(range(count), enumerate(names)):
            place = places[expert, i]
            place.copy_(self._stacked(name.format(expert), *place.shape))
        return data

    def _fp8_stack(
        self, names: list[str], count: int, rows: int, in_features: int, height: int
    ) -> tuple[Tensor, Tensor]:
        """The FP8 matrices ``names`` of all experts, one below the other in each of them: codes
        ``[count, rows, in_features]``, and scales of ``height`` rows, which divide a matrix."""
        parts = len(names)
        own = rows // parts
        shape = count, parts, own, in_features
        data = torch.empty(shape, dtype=torch.uint8, device=self.device)
        shape = count, parts, own // height, blocks_of(in_features)
        scales = torch.empty(shape, dtype=torch.float32, device=self.device)
        for expert, (i, name) in itertools.product(range(count), enumerate(names)):
            weight = self._fp8(name.format(expert), (own, in_features))
            data[expert, i] = weight.data
            scales[expert, i] = weight.lowered(height)
        return data.flatten(1, 2), scales.flatten(1, 2)

    def _stacked(self, name: str, *shape: int) -> Tensor:
        return self._place(self._read(name, shape), self.dtype)

    def finish(self, tied: bool, layers: int) -> None:
        """ModelLoadError if tensors are left over. A stored copy of a tied head is not, nor are
        layers behind the last one, which predict further tokens (DeepSeek V3, GLM-4.5)."""
        names = {
            name
            for name in self._folder.names()
            if not name.endswith(_DERIVED_SUFFIXES) and _layer(name) < layers
        }
        if tied:
            names.discard("lm_head.weight")
        self._check_used(names, str(self._folder.path(min(names, default="")).parent))


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 for those outside the layers."""
    match = _IN_LAYER.match(name)
    return int(match[1]) if match else -1


def _in_order(rows: Tensor, interleaved: bool) -> Tensor:
    return gate_then_up(rows) if interleaved else rows


class GGUFWeights(_FileWeights):
    """Weights of a GGUF file. On the CPU, blocks stay where the file is mapped."""

    def __init__(
        self,
        file: GGUFFile,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        advance: Advance,
    ) -> None:
        """``config`` is what ``gguf_config(file)`` returned."""
        super().__init__(dtype, device, advance)
        self._file = file
        self._config = config
        self._names = NAME_MAPS[file.get_str("general.architecture")]

    def vector(self, name: str, size: int) -> Tensor:
        return self._place(self._rows(name, (size,)), self.dtype)

    def norm(self, name: str, size: int, offset: float) -> Tensor:
        weight = self._place(self._rows(name, (size,)), torch.float32)
        return weight + (offset - self._names.norm_shift)

    def head_norms(self, name: str, heads: int, dim: int) -> Tensor:
        return self._place(self._rows(f"{name}.weight", (heads, dim)), torch.float32)

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        if parts := self._names.split_tensors(name):
            shape = (out_features // len(parts), in_features)
            return merge([self._weight(*self._stored(own, shape)) for own in parts])
        if self._is_halved(name):
            return DenseWeight(self._place(self._kv_b(name, in_features), self.dtype))
        rows = self._rows(name, (out_features, in_features))
        return self._weight(self._file.tensors[self._names.gguf_name(name)].format, rows)

    def _weight(self, form: QuantFormat, rows: Tensor) -> Weight:
        if form.dtype is None:
            return place(BlockWeight(form, self._place(rows, torch.uint8)), self.dtype)
        return DenseWeight(self._place(rows, self.dtype))

    def skip(self, name: str) -> None:
        self._used.add(self._names.gguf_name(name))

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._place(self._rows(name, (math.prod(shape),)), torch.float32)

    def experts(self, prefix: str, moe: MoEConfig, hidden: int) -> Experts:
        inner, count = moe.intermediate_size, moe.experts
        up = self._expert_tensors(
            [prefix + name for name in moe.gate_up], (count, 2 * inner, hidden)
        )
        down = self._expert_tensors([prefix + moe.down], (count, hidden, inner))
        up_bias = down_bias = None
        if moe.biases is not None:
            names = [prefix + name for name in moe.biases]
            up_bias = self._dense_parts(self._expert_tensors(names[:1], (count, 2 * inner)))
            down_bias = self._dense_parts(self._expert_tensors(names[1:], (count, hidden)))
        forms = {form.name: form.dtype is None for form, _ in (*up, *down)}
        if not any(forms.values()):
            return DenseExperts(self._dense_parts(up), up_bias, self._dense_parts(down), down_bias)
        if not all(forms.values()):
            raise ModelLoadError(
                f"{self._file.path}: the experts at {prefix[:-1]} are {', '.join(forms)}; accepted:"
                " all of them quantised, or none"
            )
        blocks = [
            (form, self._place(raw, torch.uint8).view(count, -1, raw.shape[1]))
            for form, raw in (*up, *down)
        ]
        return place_experts(
            BlockExperts(tuple(blocks[:-1]), up_bias, blocks[-1], down_bias, self.dtype)
        )

    def _dense_parts(self, parts: list[tuple[QuantFormat, Tensor]]) -> Tensor:
        """Parts of the output, one below the other in every expert."""
        placed = [self._place(data, self.dtype) for _, data in parts]
        return placed[0] if len(placed) == 1 else torch.cat(placed, 1)

    def _expert_tensors(
        self, names: list[str], shape: tuple[int, ...]
    ) -> list[tuple[QuantFormat, Tensor]]:
        """The parts of tensors ``names`` of all experts, which together have ``shape``: dense, or
        raw bytes ``[experts * rows, row_bytes]``."""
        tensors = [own for name in names for own in self._names.expert_tensors(name)]
        joined = tensors[0].replace("_gate_exps", "_gate_up_exps")
        if len(tensors) == 2 and joined in self._file.tensors:
            tensors = [joined]
        rows = shape[1] // len(tensors)
        return [self._expert_tensor(own, (shape[0], rows, *shape[2:])) for own in tensors]

    def _expert_tensor(self, own: str, shape: tuple[int, ...]) -> tuple[QuantFormat, Tensor]:
        """The tensor ``own`` of ``shape``, or, in files that have one for each expert, all of
        them: its format and dense numbers or raw bytes."""
        stem, _, kind = own.rpartition("_exps.")
        if own in self._file.tensors or f"{stem}.0.{kind}" not in self._file.tensors:
            return self._stored(own, shape)
        parts = [self._stored(f"{stem}.{e}.{kind}", shape[1:]) for e in range(shape[0])]
        forms = {form.name: form for form, _ in parts}
        if len(forms) > 1:
            raise ModelLoadError(
                f"{self._file.path}: tensors {stem}.*.{kind} have types {', '.join(forms)}; "
                "one type is accepted"
            )
        data = torch.cat([data for _, data in parts])
        return parts[0][0], data if parts[0][0].dtype is None else data.view(shape)

    def finish(self) -> None:
        """ModelLoadError if tensors are left over, other than in layers behind the last one."""
        layers = int(self._config["num_hidden_layers"])
        names = {name for name in self._file.tensors if _layer(name) < layers}
        names -= self._names.consumed
        self._check_used(names, str(self._file.path))

    def _is_halved(self, name: str) -> bool:
        """Whether the file has this matrix in two tensors."""
        missing = self._names.gguf_name(name) not in self._file.tensors
        return missing and name.endswith("kv_b_proj.weight")

    def _kv_b(self, name: str, latent: int) -> Tensor:
        """Latent attention's matrix to keys and values, ``[heads * (Dn + Dv), latent]``: files have
        ``[heads, latent, Dn]``, transposed, and ``[heads, Dv, latent]``."""
        sizes = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
        heads, plain, value = (int(self._config[key]) for key in sizes)
        keys = self._floats(name.replace("kv_b_proj", "k_b_proj"), (heads, latent, plain))
        values = self._floats(name.replace("kv_b_proj", "v_b_proj"), (heads, value, latent))
        return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of ``name`` as float32."""
        rows = self._rows(name, shape)
        form = self._file.tensors[self._names.gguf_name(name)].format
        return (rows.float() if form.dtype is not None else form.dequantize(rows)).view(shape)

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of ``name``, which must have ``shape``: floats, or blocks as raw bytes."""
        own = self._names.gguf_name(name)
        place = self._names.place_in_stack(name)
        if place is None:
            form, rows = self._stored(own, shape)
        else:
            form, rows = self._stored_in_stack(own, place, shape)
        if len(shape) == 1 and form.dtype is None:
            raise ModelLoadError(f"{self._file.path}: tensor {own} is {form.name}, expected floats")
        heads = self._names.permuted_heads(name, self._config)
        return unpermute_rows(rows, heads) if heads else rows

    def _stored_in_stack(
        self, own: str, place: int, shape: tuple[int, ...]
    ) -> tuple[QuantFormat, Tensor]:
        """Matrix ``place`` of those of ``shape`` that ``own`` has."""
        found = self._file.tensors.get(own)
        count = max(found.shape[0], place + 1) if found else place + 1
        form, rows = self._stored(own, (count, *shape))
        return form, rows.reshape(count, shape[0], -1)[place]

    def _stored(self, own: str, shape: tuple[int, ...]) -> tuple[QuantFormat, Tensor]:
        """The file's tensor ``own``, which must have ``shape``."""
        if own not in self._file.tensors:
            raise ModelLoadError(f"{self._file.path}: tensor {own} is missing")
        tensor = self._file.tensors[own]
        squeezed = shape[0] == 1 and tensor.shape == shape[1:]  # as llama.cpp does with one row
        if not squeezed:
            _check_shape(str(self._file.path), own, tensor.shape, shape)
        self._used.add(own)
        form = tensor.format
        if form.dtype is None:
            return form, self._file.raw(own)
        return form, self._file.dense(own).view(shape)
