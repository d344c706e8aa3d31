"""FP8 checkpoints with scales by block against transformers on the weights they stand for.

Tiny random models, whose matrices are rounded to FP8 here, written as DeepSeek and Qwen publish
them, and read by our loader. Sizes are such that blocks are cut at every edge, and that q, k and v,
or gate and up, do not begin at a block.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.quant.fp8_weight import Fp8Weight
from squall.models.mlp import GatedMLP
from squall.tools.logits import sequence_logits
from tests.e2e.test_golden_logits import SIZES, TOKENS, load, save_random

_ODD = {"hidden_size": 208, "intermediate_size": 336, "num_attention_heads": 4}
# family, settings, type of the scales, rows of scales of the merged q, k, v and gate, up
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, int, int]] = {
    "llama": ("Llama", {**_ODD, "head_dim": 36}, torch.float32, 8, 16),
    "llama-whole-blocks": (
        "Llama",
        {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4},
        torch.float32,
        128,
        128,
    ),
    "qwen3": ("Qwen3", {**_ODD, "head_dim": 32}, torch.bfloat16, 64, 16),
    "qwen2-odd": (
        "Qwen2",
        {"hidden_size": 132, "intermediate_size": 141, "num_attention_heads": 6},
        torch.float32,
        4,
        1,
    ),
    "glm4-reordered": ("Glm4", {**_ODD, "head_dim": 36}, torch.float32, 1, 128),
    "phi3-fused": ("Phi3", {**_ODD, "num_attention_heads": 2}, torch.float32, 128, 128),
}


def blocks(weight: Tensor, scale_type: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 codes ``[N, K]``, scales by 128 x 128, and the numbers both stand for."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % 128, 0, -n % 128))
    tiles = padded.view(padded.shape[0] // 128, 128, -1, 128)
    scales = (tiles.abs().amax((1, 3)) / 448).to(scale_type)
    spread = scales.float()[:, None, :, None]
    codes = (tiles / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    numbers = (codes.float() * spread).view(padded.shape)[:n, :k]
    return codes.view(padded.shape)[:n, :k].contiguous(), scales, numbers.contiguous()


def quantise(folder: Path, model: torch.nn.Module, scale_type: torch.dtype) -> None:
    """Round the model's projections in place and write them into ``folder``."""
    left = ("lm_head", "embed", "layers.1.self_attn.o_proj", "norm")
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2 or any(part in name for part in left):
                tensors[name] = parameter.detach().clone()
                continue
            codes, scales, numbers = blocks(parameter, scale_type)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            parameter.copy_(numbers)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(left),
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_dequantised_model(
    case: str, device: str, tmp_path: Path
) -> None:
    family, overrides, scale_type, qkv_height, gate_height = CASES[case]
    reference = save_random(tmp_path, family, overrides)
    quantise(tmp_path, reference, scale_type)
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].float()
    model = load(tmp_path, device)
    block = model.blocks[0]
    assert isinstance(block.mlp, GatedMLP)
    for linear, height in (
        (block.attention.qkv, qkv_height),
        (block.mlp.gate_up, gate_height),
    ):
        assert isinstance(linear.weight, Fp8Weight)
        assert linear.weight.height == height
    limit = 1e-4 * expected.abs().max().item()
    for chunk in (TOKENS, 7, 1):  # whole prefill, chunked prefill, decode
        found = sequence_logits(model, ids, chunk, block_size=8)
        assert (found - expected).abs().max().item() <= limit, f"chunks of {chunk}"
