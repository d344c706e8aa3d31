"""Weight sources over model files: each tensor is read once, checked, and put on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from squall.kernels.quant.fp8 import blocks_of
from squall.kernels.quant.fp8_weight import Fp8Weight
from squall.kernels.weight import BlockWeight, DenseWeight, Weight, place
from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_names import NAME_MAPS, unpermute_rows
from squall.loaders.progress import Advance
from squall.loaders.safetensors import DTYPES, SafetensorsFolder

# Tensors older exporters left in checkpoints; they can be derived and no model reads them.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
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

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        shape = (out_features, in_features)
        if self._folder.dtype(name) == torch.float8_e4m3fn:
            return self._fp8(name, shape)
        return DenseWeight(self._place(self._read(name, shape), self.dtype))

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

    def finish(self, tied: bool) -> None:
        """ModelLoadError if tensors are left over. A stored copy of a tied head is not."""
        names = {n for n in self._folder.names() if not n.endswith(_DERIVED_SUFFIXES)}
        if tied:
            names.discard("lm_head.weight")
        self._check_used(names, str(self._folder.path(min(names, default="")).parent))


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

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        rows = self._rows(name, (out_features, in_features))
        form = self._file.tensors[self._names.gguf_name(name)].format
        if form.dtype is None:
            return place(BlockWeight(form, self._place(rows, torch.uint8)), self.dtype)
        return DenseWeight(self._place(rows, self.dtype))

    def finish(self) -> None:
        """ModelLoadError if tensors are left over."""
        names = set(self._file.tensors) - self._names.consumed
        self._check_used(names, str(self._file.path))

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of ``name``, which must have ``shape``: floats, or blocks as raw bytes."""
        own = self._names.gguf_name(name)
        if own not in self._file.tensors:
            raise ModelLoadError(f"{self._file.path}: tensor {own} is missing")
        tensor = self._file.tensors[own]
        _check_shape(str(self._file.path), own, tensor.shape, shape)
        if len(shape) == 1 and tensor.format.dtype is None:
            found = tensor.format.name
            raise ModelLoadError(f"{self._file.path}: tensor {own} is {found}, expected floats")
        self._used.add(own)
        rows = self._file.raw(own) if tensor.format.dtype is None else self._file.dense(own)
        heads = self._names.permuted_heads(name, self._config)
        return unpermute_rows(rows, heads) if heads else rows
