"""FP8 checkpoints with scales by block against transformers on the weights they stand for.

Tiny random models, whose matrices are rounded to FP8 here, written as DeepSeek and Qwen publish
them, and read by our loader. Sizes are such that blocks are cut at every edge, and that q, k and v,
or gate and up, do not begin at a block. So are those of mixtures of experts.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from squall.kernels.moe.experts import Fp8Experts
from squall.kernels.quant.fp8_weight import Fp8Weight
from squall.loaders.errors import ModelLoadError
from squall.models.decoder import Decoder
from squall.models.mlp import GatedMLP
from squall.models.moe import MoE
from squall.tools.logits import sequence_logits
from tests.e2e.test_golden_logits import (
    DEEPSEEK_EXPERTS,
    LATENT,
    SIZES,
    TOKENS,
    load,
    save_random,
)

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
_QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
# family, settings, type of the scales, rows of scales of the experts' gate and up, and of down
EXPERTS: dict[str, tuple[str, dict[str, Any], torch.dtype, int, int]] = {
    "qwen3-moe": (
        "Qwen3Moe",
        {**_ODD, **_QWEN_EXPERTS, "head_dim": 32, "moe_intermediate_size": 144},
        torch.bfloat16,
        16,
        16,
    ),
    "qwen3-moe-whole-blocks": (
        "Qwen3Moe",
        {**_QWEN_EXPERTS, "hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64},
        torch.float32,
        128,
        128,
    ),
    "qwen3-moe-cut-blocks": (
        "Qwen3Moe",
        {**_QWEN_EXPERTS, "hidden_size": 132, "moe_intermediate_size": 140, "head_dim": 32},
        torch.float32,
        4,
        4,
    ),
    # kv_b_proj is cut at both edges: 144 x 136.
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_ODD,
            **LATENT,
            **DEEPSEEK_EXPERTS,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 136,
            "q_lora_rank": 36,
            "kv_lora_rank": 136,
            "v_head_dim": 16,
        },
        torch.float32,
        8,
        16,
    ),
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


def matrices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter's matrices as checkpoints have them; transformers stacks those of experts."""
    stem, _, kind = name.rpartition(".")
    if tensor.dim() != 3:
        return {name: tensor}
    parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: 0}
    rows = tensor.shape[1] // len(parts)
    return {
        f"{stem}.{expert}.{part}.weight": stack[i * rows : (i + 1) * rows]
        for expert, stack in enumerate(tensor)
        for part, i in parts.items()
    }


def quantise(folder: Path, model: torch.nn.Module, scale_type: torch.dtype) -> None:
    """Round the model's projections in place and write them into ``folder``."""
    left = ("lm_head", "embed", "layers.1.self_attn.o_proj", "norm", "mlp.gate.")
    tensors: dict[str, Tensor] = {}
    for stack, stacked in model.state_dict().items():
        for name, tensor in matrices(stack, stacked).items():
            if tensor.dim() != 2 or any(part in name for part in left):
                tensors[name] = tensor.clone()
                continue
            codes, scales, numbers = blocks(tensor, scale_type)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            tensor.copy_(numbers)
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


def check_logits(model: Decoder, reference: torch.nn.Module) -> None:
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].float()
    limit = 1e-4 * expected.abs().max().item()
    for chunk in (TOKENS, 7, 1):  # whole prefill, chunked prefill, decode
        found = sequence_logits(model, ids, chunk, block_size=8)
        assert (found - expected).abs().max().item() <= limit, f"chunks of {chunk}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_dequantised_model(
    case: str, device: str, tmp_path: Path
) -> None:
    family, overrides, scale_type, qkv_height, gate_height = CASES[case]
    reference = save_random(tmp_path, family, overrides)
    quantise(tmp_path, reference, scale_type)
    model = load(tmp_path, device)
    block = model.blocks[0]
    assert isinstance(block.mlp, GatedMLP)
    for linear, height in (
        (block.attention.qkv, qkv_height),
        (block.mlp.gate_up, gate_height),
    ):
        assert isinstance(linear.weight, Fp8Weight)
        assert linear.weight.height == height
    check_logits(model, reference)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_keep_their_bytes(case: str, device: str, tmp_path: Path) -> None:
    family, overrides, scale_type, up_height, down_height = EXPERTS[case]
    reference = save_random(tmp_path, family, overrides)
    quantise(tmp_path, reference, scale_type)
    model = load(tmp_path, device)
    mlp = model.blocks[-1].mlp
    assert isinstance(mlp, MoE)
    experts = mlp.experts
    assert isinstance(experts, Fp8Experts)
    hidden, inner = overrides["hidden_size"], overrides["moe_intermediate_size"]
    count, (across, along) = mlp.moe.experts, (-(-size // 128) for size in (hidden, inner))
    assert experts.gate_up_scales.shape == (count, 2 * inner // up_height, across)
    assert experts.down_scales.shape == (count, hidden // down_height, along)
    scales = experts.gate_up_scales.nbytes + experts.down_scales.nbytes
    assert experts.nbytes == 3 * count * hidden * inner + scales
    check_logits(model, reference)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "down_proj.weight is F8_E4M3, but {}_scale_inv is missing"),
        ("dense", "tensor {} is torch.float32, accepted: F8_E4M3"),
    ],
)
def test_experts_that_are_not_all_fp8(kind: str, message: str, tmp_path: Path) -> None:
    family, overrides, scale_type, *_ = EXPERTS["qwen3-moe"]
    quantise(tmp_path, save_random(tmp_path, family, overrides), scale_type)
    path, name = tmp_path / "model.safetensors", "model.layers.2.mlp.experts.3.down_proj.weight"
    tensors = load_file(path)
    scales = tensors.pop(f"{name}_scale_inv")
    if kind == "dense":
        tensors |= {name: tensors[name].float(), f"{name}_scale_inv": scales}
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(ModelLoadError, match=re.escape(message.format(name))) as error:
        load(tmp_path, "cpu")
    assert str(path) in str(error.value)
