"""MXFP4 experts of Hugging Face checkpoints: the same numbers as transformers makes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from squall.kernels.quant.base import gguf_formats
from squall.loaders.errors import ModelLoadError
from squall.loaders.mxfp4 import blocks_of, gate_then_up, read_experts
from squall.loaders.safetensors import SafetensorsFolder

MXFP4 = gguf_formats()[39]
SHAPE = (3, 10, 96)  # experts, rows, columns


def stack(low: int = 100, high: int = 140) -> tuple[Tensor, Tensor]:
    """Blocks and scales of random experts; exponents from ``low`` to below ``high``."""
    generator = torch.Generator().manual_seed(0)
    experts, rows, columns = SHAPE
    shape = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("low", "high"), [(100, 140), (0, 3), (250, 254)])
def test_numbers_are_those_of_transformers(low: int, high: int) -> None:
    blocks, scales = stack(low, high)
    raw = blocks_of(blocks, scales)
    assert raw.shape == (*SHAPE[:2], MXFP4.row_bytes(SHAPE[2]))
    assert raw.is_contiguous()
    want = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(MXFP4.dequantize(raw), want.transpose(1, 2))  # theirs are [E, K, N]


def test_gate_and_up_come_apart() -> None:
    rows = torch.arange(2 * 6 * 5).view(2, 6, 5)
    assert torch.equal(gate_then_up(rows), rows[:, [0, 2, 4, 1, 3, 5]])
    assert torch.equal(gate_then_up(rows[..., 0]), rows[:, [0, 2, 4, 1, 3, 5], 0])


def write(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> SafetensorsFolder:
    blocks, scales = stack()
    tensors = {"up_blocks": blocks, "up_scales": scales}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsFolder.open(folder)


def test_a_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, lambda tensors: None)
    assert torch.equal(read_experts(folder, "up", SHAPE), blocks_of(*stack()))


@pytest.mark.parametrize(
    ("edit", "shape", "message"),
    [
        (lambda t: t.pop("up_scales"), SHAPE, "tensor up_scales is missing"),
        (lambda t: t.pop("up_blocks"), SHAPE, "tensor up_blocks is missing"),
        (
            lambda t: None,
            (3, 10, 64),
            r"up_blocks is torch.uint8 \[3, 10, 3, 16\], expected .*2, 1",
        ),
        (lambda t: None, (3, 10, 80), "rows of 80; accepted: multiples of 32"),
        (
            lambda t: t.update(up_scales=t["up_scales"].short()),
            SHAPE,
            r"up_scales is torch.int16 \[3, 10, 3\], expected torch.uint8 \[3, 10, 3\]",
        ),
    ],
    ids=["scales", "blocks", "shape", "columns", "type"],
)
def test_checkpoints_that_do_not_fit(
    tmp_path: Path,
    edit: Callable[[dict[str, Tensor]], object],
    shape: tuple[int, int, int],
    message: str,
) -> None:
    folder = write(tmp_path, edit)
    with pytest.raises(ModelLoadError, match=message) as error:
        read_experts(folder, "up", shape)
    assert str(tmp_path) in str(error.value)
