"""MXFP4 experts of Hugging Face checkpoints (GPT-OSS), as the blocks of GGUF's MXFP4.

A stack of E matrices ``[N, K]`` is two uint8 tensors: ``X_blocks [E, N, K / 32, 16]``, byte i of a
block holding weight 2i in its low and weight 2i + 1 in its high half, and ``X_scales [E, N, K /
32]``, exponents with bias 127. Codes and exponents are GGUF's too
(:mod:`squall.kernels.quant.gguf_mxfp4`), only halves of bytes change places, so nothing is lost.
Layout: transformers ``integrations/mxfp4.py``.
"""

import torch
from torch import Tensor

from squall.loaders.errors import ModelLoadError
from squall.loaders.safetensors import SafetensorsFolder

_WEIGHTS, _BYTES = 32, 16  # of a block


def blocks_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """``[..., N, K / 32, 16]`` and ``[..., N, K / 32]`` -> rows of GGUF blocks, uint8
    ``[..., N, K / 32 * 17]``, new and dense."""
    assert blocks.dtype == scales.dtype == torch.uint8, f"{blocks.dtype}, {scales.dtype}"
    assert blocks.shape == (*scales.shape, _BYTES), f"blocks {blocks.shape}, scales {scales.shape}"
    rows = blocks.new_empty((*scales.shape, 1 + _BYTES))
    rows[..., 0] = scales
    # Weights 0 to 15 are the first eight bytes' halves, 16 to 31 the others'.
    first, second = blocks[..., : _BYTES // 2], blocks[..., _BYTES // 2 :]
    rows[..., 1::2] = (first & 15) | (second << 4)
    rows[..., 2::2] = (first >> 4) | (second & 0xF0)
    return rows.flatten(-2)


def gate_then_up(stack: Tensor) -> Tensor:
    """Rows ``[E, 2F, ...]`` of which the even ones are gate, the odd ones up (``gate_up_proj`` and
    its bias): all gate rows of an expert, then all up rows."""
    return torch.cat((stack[:, 0::2], stack[:, 1::2]), 1)


def read_experts(folder: SafetensorsFolder, name: str, shape: tuple[int, int, int]) -> Tensor:
    """The stack ``name`` of E, N, K (without ``_blocks``) as uint8 ``[E, N, row bytes]``.

    ``ModelLoadError`` naming the tensor: missing, misshapen, not uint8, or K not whole blocks.
    """
    experts, rows, columns = shape
    if columns % _WEIGHTS:
        where = f"{folder.path(f'{name}_blocks')}: tensor {name}_blocks"
        raise ModelLoadError(f"{where}: rows of {columns}; accepted: multiples of {_WEIGHTS}")
    groups = experts, rows, columns // _WEIGHTS
    blocks = _read(folder, f"{name}_blocks", (*groups, _BYTES))
    return blocks_of(blocks, _read(folder, f"{name}_scales", groups))


def _read(folder: SafetensorsFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    found = folder.info(name)
    if found.shape != shape or found.dtype != torch.uint8:
        raise ModelLoadError(
            f"{folder.path(name)}: tensor {name} is {found.dtype} {list(found.shape)}, "
            f"expected torch.uint8 {list(shape)}"
        )
    return folder.tensor(name)
