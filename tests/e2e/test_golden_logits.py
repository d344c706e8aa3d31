"""Every architecture against transformers: tiny random models saved to disk, read by our loader.

One row an architecture (or a quirk of one). The comparison is in float32, on the CPU and on a GPU,
for the prompt as a whole, in chunks, and token by token.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from squall.loaders.hub import resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import NoProgress
from squall.models.decoder import Decoder
from squall.tools.logits import sequence_logits

TOKENS = 45  # past the sliding windows and past original_max_position_embeddings below
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 7.5],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# Of DeepSeek. Heads of q and k are 20 and 10 elements; no size is a power of two.
LATENT = {
    "num_key_value_heads": None,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 10,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 3,
}
MSCALE = {"beta_fast": 4.0, "mscale": 0.707, "mscale_all_dim": 0.707}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

DEEPSEEK_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}

PHIMOE = {
    "num_local_experts": 5,
    "router_jitter_noise": 0.2,
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 11,
}
# Layers 1 and 3 have experts, layer 3 has no positions and sees all.
LLAMA4 = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 80,
    "num_local_experts": 5,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 12,
    "floor_scale": 6,
    "attn_scale": 0.4,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20, "num_attention_heads": 12}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-rope-dynamic": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    ),
    "llama-rope-dynamic-short": ("Llama", {"rope_parameters": DYNAMIC}),
    "internlm3": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "rope_parameters": DYNAMIC,
            "max_position_embeddings": 16,
        },
    ),
    "internlm3-qkv-bias": ("Qwen2", {}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 12, "attention_bias": True}),
    "hunyuan-alpha": (
        "HunYuanDenseV1",
        {"head_dim": 12, "rope_parameters": DYNAMIC | {"alpha": 1000.0, "factor": 1.0}},
    ),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 16,
            "rope_parameters": YARN
            | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True}),
    "seed_oss-qkv-bias": ("SeedOss", {"head_dim": 12}),
    "helium": (
        "Helium",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "rms_norm_eps": 1e-8},
    ),
    "apertus": (
        "Apertus",
        {"attention_bias": True, "rope_parameters": LLAMA3, "dtype": torch.float32},
    ),
    "olmo": ("Olmo", {"clip_qkv": 0.5, "attention_bias": True}),
    "olmo-unclipped": ("Olmo", {}),
    "arcee": ("Arcee", {"mlp_bias": True, "head_dim": 12, "rope_parameters": YARN}),
    "nemotron": (
        "Nemotron",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "exaone4": (
        "Exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": LLAMA3,
        },
    ),
    "exaone4-window": (
        "Exaone4",
        {"sliding_window": 8, "num_hidden_layers": 5, "rope_parameters": LLAMA3},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 9}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "phimoe": ("Phimoe", PHIMOE),
    "phimoe-first-name": ("Phimoe", PHIMOE),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
        },
    ),
    "granitemoe-shared": (
        "GraniteMoeShared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 36},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {
            **DEEPSEEK_EXPERTS,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "head_dim": 16,
        },
    ),
    "ernie4_5-moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "hunyuan-moe": (
        "HunYuanMoEV1",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "attention_bias": True},
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
        },
    ),
    "llama4": ("Llama4Text", LLAMA4),
    "llama4-no-norms": (
        "Llama4Text",
        LLAMA4
        | {
            "use_qk_norm": False,
            "moe_layers": [0],
            "no_rope_layers": [1, 0, 0, 1, 1],
            "attention_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama4-no-tuning": (
        "Llama4Text",
        LLAMA4 | {"attn_temperature_tuning": False, "interleave_moe_layer_step": 1},
    ),
    "ministral": (
        "Ministral",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": (
        "SmolLM3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "attention_bias": True,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite-biases": ("Granite", {"attention_bias": True, "mlp_bias": True}),
    "ernie4_5": ("Ernie4_5", {"use_bias": True, "head_dim": 12}),
    "glm": ("Glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("Glm4", {"head_dim": 16, "attention_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo2-biases": ("Olmo2", {"attention_bias": True, "head_dim": 12}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 8,
            "num_hidden_layers": 5,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v2-queries-biases": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": 36, "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v2-biases": ("DeepseekV2", LATENT | {"attention_bias": True}),
    "deepseek_v2-yarn": ("DeepseekV2", LATENT | {"rope_parameters": YARN | MSCALE}),
    "deepseek_v2-yarn-plain": ("DeepseekV2", LATENT | {"rope_parameters": YARN}),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 36, "rope_parameters": YARN | MSCALE | {"mscale": 1.3}},
    ),
    "deepseek_v2-experts": ("DeepseekV2", LATENT | DEEPSEEK_EXPERTS | {"norm_topk_prob": False}),
    "deepseek_v2-groups": (
        "DeepseekV2",
        LATENT
        | DEEPSEEK_EXPERTS
        | {
            "norm_topk_prob": False,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v3-experts": (
        "DeepseekV3",
        LATENT | DEEPSEEK_EXPERTS | {"n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3-one-group": (
        "DeepseekV3",
        LATENT | DEEPSEEK_EXPERTS | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "deepseek_v3-halves": (
        "DeepseekV3",
        LATENT | {"rope_interleave": False, "v_head_dim": 40, "attention_bias": True},
    ),
    "stablelm": (
        "StableLm",
        {"use_qkv_bias": True, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "stablelm-parallel": (
        "StableLm",
        {"use_parallel_residual": True, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "stablelm-qk-norm": (
        "StableLm",
        {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
    ),
    "cohere-qk-norm": (
        "Cohere",
        {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2",
        {"num_hidden_layers": 5, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 9, "tie_word_embeddings": True}),
    "starcoder2-no-biases": ("Starcoder2", {"use_bias": False, "sliding_window": None}),
    "phi2": ("Phi", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "phi3": ("Phi3", {}),
    "phi3-window-partial": (
        "Phi3",
        {
            "sliding_window": 9,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "phi3-longrope-short": (
        "Phi3",
        {
            "original_max_position_embeddings": 50,
            "rope_parameters": LONGROPE | {"attention_factor": 1.2},
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            "num_hidden_layers": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2
            + ["sliding_attention", "full_attention", "sliding_attention"],
            "num_kv_shared_layers": 3,
            "sliding_window": 8,
            "head_dim": 16,
            "intermediate_size": [80, 80, 64, 80, 48, 80, 80],
            "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.0, 0.7, 0.0],
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 12,
            "laurel_rank": 8,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "rope_parameters": GEMMA_ROPES,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3n-unshared": (
        "Gemma3nText",
        {
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 0,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 97,
            "altup_correct_scale": False,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-ropes-softcaps": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 5,
            "num_hidden_layers": 6,
            "rope_parameters": GEMMA_ROPES,
            "final_logit_softcapping": 20.0,
        },
    ),
}


# Classes that transformers has not, or not by this name: config.json says what the published files
# of the class say, and the weights are those of another class with the same arithmetic.
_INTERNLM3 = {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}
REWRITTEN: dict[str, dict[str, Any]] = {
    "internlm3": _INTERNLM3
    | {
        "qkv_bias": True,
        "bias": True,
        "attention_bias": None,
        "mlp_bias": None,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    "internlm3-qkv-bias": _INTERNLM3 | {"qkv_bias": True, "bias": False},
    "phimoe-first-name": {"architectures": ["PhiMoEForCausalLM"]},
}


def save_random(folder: Path, family: str, overrides: dict[str, Any]) -> torch.nn.Module:
    """A random model with every parameter (norms and biases too) away from its initial value."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "tie_word_embeddings": False, **overrides}
    )
    name = family.removesuffix("Text")
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.eval().save_pretrained(folder)
    return model


# Text parts: the class of the whole model, its text config's class, and what is special about it.
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("Gemma3", "Gemma3Text", CASES["gemma3"][1]),
    "Mistral3ForConditionalGeneration": ("Mistral3", "Mistral", CASES["mistral-window"][1]),
    "Llama4ForConditionalGeneration": ("Llama4", "Llama4Text", CASES["llama4"][1]),
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_random_part(folder: Path, case: str, tied: bool) -> torch.nn.Module:
    """A random model that sees as well."""
    torch.manual_seed(0)
    family, text, overrides = PARTS[case]
    config_class = getattr(transformers, f"{family}Config")
    settings = SIZES | {"tie_word_embeddings": tied} | overrides
    config = config_class(
        text_config=getattr(transformers, f"{text}Config")(**settings),
        vision_config=TINY_VISION,
        tie_word_embeddings=tied,
        mm_tokens_per_image=4,
    )
    model = getattr(transformers, case)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def rewrite_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint = Checkpoint(resolve(str(folder)))
    return checkpoint.decoder(torch.device(device), dtype, TOKENS, NoProgress())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, device: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    reference = save_random(tmp_path, family, overrides)
    rewrite_config(tmp_path, REWRITTEN.get(case, {}))
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].float()
    model = load(tmp_path, device)
    limit = 1e-4 * expected.abs().max().item()
    for chunk in (TOKENS, 7, 1):  # whole prefill, chunked prefill, decode
        found = sequence_logits(model, ids, chunk, block_size=8)
        assert (found - expected).abs().max().item() <= limit, f"chunks of {chunk}"
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), f"chunks of {chunk}"


# Share of positions that bfloat16 keeps within 2% of the largest logit, where it is not all:
# rounding moves a token between experts that are nearly equal, or gates across a threshold.
STEADY = {"exaone4": 0.8, "gemma3n": 0.5, "gemma3n-unshared": 0.3}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_logits_in_bfloat16(case: str, tmp_path: Path) -> None:
    """Of the same rounded weights, ours computed in bfloat16 and transformers' in float32."""
    family, overrides = CASES[case]
    reference = save_random(tmp_path, family, overrides).bfloat16().float()
    reference.save_pretrained(tmp_path)
    rewrite_config(tmp_path, REWRITTEN.get(case, {}))
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    model = load(tmp_path, "cuda", torch.bfloat16)
    wanted = STEADY.get(case, 0.9 if model.config.moe else 1.0)
    for chunk in (TOKENS, 1):
        found = sequence_logits(model, ids, chunk, block_size=8)
        error = (found - expected).abs().amax(-1) / expected.abs().max()
        assert (error <= 2e-2).float().mean().item() >= wanted, f"chunks of {chunk}: {error}"


@pytest.mark.parametrize("names", ["published", "new"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", PARTS)
def test_text_parts_equal_transformers(case: str, tied: bool, names: str, tmp_path: Path) -> None:
    """The text model is found among the parts of a larger one, whatever release named them."""
    reference = save_random_part(tmp_path, case, tied)
    if names == "new":
        tensors = reference.state_dict().items()
        kept = {k: v for k, v in tensors if not (tied and k.endswith("lm_head.weight"))}
        save_file(kept, tmp_path / "model.safetensors")
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        # Llama 4's whole wants a picture in some releases.
        text = reference.language_model if case.startswith("Llama4") else reference
        expected = text(torch.tensor([ids])).logits[0]
    found = sequence_logits(load(tmp_path, "cpu"), ids, TOKENS, block_size=8)
    assert (found - expected).abs().max().item() <= 1e-4 * expected.abs().max().item()


def test_the_text_part_of_gemma3n(tmp_path: Path) -> None:
    """As published: layers that share keys and values have projections of their own all the same,
    and the text model's names begin with those of the whole."""
    reference = save_random(tmp_path / "text", *CASES["gemma3n"])
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    config = {"architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    for name in ("k_proj", "v_proj", "k_norm"):
        stored = f"model.language_model.layers.0.self_attn.{name}.weight"
        tensors[stored.replace("layers.0", "layers.6")] = torch.randn_like(tensors[stored])
    tensors["model.vision_tower.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    found = sequence_logits(load(folder, "cpu"), ids, TOKENS, block_size=8)
    assert (found - expected).abs().max().item() <= 1e-4 * expected.abs().max().item()
