"""Every GGUF architecture against transformers: tiny random models in files as llama.cpp writes
them, read by our loader.

Tensor names are those of the ``gguf`` package. What else llama.cpp's converter does (rows of q and
k in another order, norms plus one, settings under other names) is written down here once more, so
that the loader is not compared with itself.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import NoProgress
from squall.tools.logits import sequence_logits
from tests.e2e.test_golden_logits import CASES, MSCALE, SIZES, TOKENS, YARN, save_random

Config = Any  # a transformers config
Keys = dict[str, Any]

Kind = gguf.GGMLQuantizationType
Q8_0, MXFP4 = Kind.Q8_0, Kind.MXFP4
WHOLE_BLOCKS = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
_WHOLE_ALTUP = {
    "intermediate_size": 96,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 32,
}
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}  # of any hidden size
# What llama.cpp has in its code and not in the file.
_NO_ROPE_EVERY = {"num_hidden_layers": 4, "no_rope_layer_interval": 4}


def _rope(config: Config) -> Keys:
    """Of models with one rope."""
    return _scaled(config.rope_parameters)


def _scaled(rope: Keys) -> Keys:
    keys = {"rope.freq_base": rope["rope_theta"]}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def _hunyuan(config: Config) -> Keys:
    """The stretched base, and the rule that was used is not told."""
    rope, dim = config.rope_parameters, _head_dim(config)
    theta = rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))
    return {"rope.freq_base": theta, "rope.scaling.type": "none", "rope.scaling.factor": 1.0}


def _exaone4(config: Config) -> Keys:
    kinds = config.layer_types
    return _rope(config) | {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
    }


def _per_layer(config: Config) -> Keys:
    """Counts as arrays of one for each layer."""
    layers = config.num_hidden_layers
    return _rope(config) | {
        "feed_forward_length": [config.intermediate_size] * layers,
        "attention.head_count": [config.num_attention_heads] * layers,
        "attention.head_count_kv": [config.num_key_value_heads] * layers,
    }


def _llama3_factors(config: Config) -> Tensor:
    """What llama.cpp divides the rotary frequencies by."""
    rope, dim = config.rope_parameters, _head_dim(config)
    original, low, high = (
        rope[name]
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _partial(config: Config) -> Keys:
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return _rope(config) | {"rope.dimension_count": int(_head_dim(config) * factor)}


def _phi3(config: Config) -> Keys:
    rope, keys = config.rope_parameters, _partial(config)
    if config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        factor = float(np.sqrt(1 + np.log(stretch) / np.log(original)))
        keys["rope.scaling.attn_factor"] = rope.get("attention_factor") or factor
        keys["rope.scaling.original_context_length"] = original
    return keys


def _granite(config: Config) -> Keys:
    return _rope(config) | {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _gemma2(config: Config) -> Keys:
    return _rope(config) | {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _stablelm(config: Config) -> Keys:
    return _partial(config) | {"use_parallel_residual": config.use_parallel_residual}


def _starcoder2(config: Config) -> Keys:
    return _rope(config) | {"attention.sliding_window": config.sliding_window}


def _cohere(config: Config) -> Keys:
    keys = _rope(config) | {"logit_scale": config.logit_scale}
    if window := getattr(config, "sliding_window", None):
        keys["attention.sliding_window"] = window
    return keys


def _olmo(config: Config) -> Keys:
    keys = _rope(config) | {"attention.layer_norm_epsilon": 1e-5}
    if config.clip_qkv:
        keys["attention.clamp_kqv"] = config.clip_qkv
    return keys


def _olmo3(config: Config) -> Keys:
    window = {"attention.sliding_window": config.sliding_window}
    return _scaled(config.rope_parameters["full_attention"]) | window


def _gemma3(config: Config) -> Keys:
    ropes = config.rope_parameters
    keys = {
        "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "attention.sliding_window": config.sliding_window,
    }
    if ropes["full_attention"]["rope_type"] == "linear":
        keys |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": ropes["full_attention"]["factor"],
        }
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    return keys


def _deepseek(config: Config) -> Keys:
    """As files were until the middle of 2025."""
    keys = _rope(config) | {
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
    }
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.rope_parameters["rope_type"] == "yarn":
        keys["rope.scaling.yarn_beta_fast"] = config.rope_parameters.get("beta_fast", 32.0)
    if weight := config.rope_parameters.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * weight
    return keys


def _deepseek_mla(config: Config) -> Keys:
    """As they have been since: the lengths without suffix are those of the cache."""
    keys = _deepseek(config)
    return keys | {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": keys["attention.key_length"],
        "attention.value_length_mla": keys["attention.value_length"],
    }


_ROUTED = {  # by key the names that configs have for it
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_k", "moe_topk"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
}
_DEEPSEEK = {
    "expert_shared_count": ("n_shared_experts",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "leading_dense_block_count": ("first_k_dense_replace",),
}
_WINDOW = {"attention.sliding_window": ("sliding_window",)}
_ERNIE = {
    "expert_shared_count": ("moe_num_shared_experts",),
    "leading_dense_block_count": ("moe_layer_start_index",),
    "interleave_moe_layer_step": ("moe_layer_interval",),
}


def _found(config: Config, names: dict[str, tuple[str, ...]]) -> Keys:
    return {
        key: value
        for key, aliases in names.items()
        for name in aliases
        if (value := getattr(config, name, None)) is not None
    }


def _routed(config: Config) -> Keys:
    return _rope(config) | _found(config, _ROUTED)


def _softmax_deepseek(config: Config) -> Keys:
    return _deepseek_mla(config) | _found(config, _ROUTED | _DEEPSEEK)


def _sigmoid_deepseek(config: Config) -> Keys:
    return _softmax_deepseek(config) | {"expert_gating_func": 2}


def _granitemoe(config: Config) -> Keys:
    return _granite(config) | _found(config, _ROUTED)


def _windowed_experts(config: Config) -> Keys:
    return _routed(config) | _found(config, _WINDOW)


def _gpt_oss(config: Config) -> Keys:
    return _windowed_experts(config) | {"expert_feed_forward_length": config.intermediate_size}


def _glm4moe(config: Config) -> Keys:
    routed = _found(config, _ROUTED | _DEEPSEEK)
    return _partial(config) | routed | {"expert_gating_func": 2}


def _ernie4_5_moe(config: Config) -> Keys:
    """The size of the shared MLP is not what the key says."""
    wrong = {"expert_shared_feed_forward_length": config.intermediate_size // 2}
    return _routed(config) | _found(config, _ERNIE) | wrong


def _hunyuan_moe(config: Config) -> Keys:
    sizes = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
    return _routed(config) | dict.fromkeys(sizes, config.intermediate_size)


def _gemma3n(config: Config) -> Keys:
    sparsity = torch.tensor(config.activation_sparsity_pattern)
    return _gemma3(config) | {
        "attention.sliding_window_pattern": [k == "sliding_attention" for k in config.layer_types],
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "activation_sparsity_scale": torch.special.ndtri(sparsity).tolist(),
    }


_EPSILONS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps"),
}
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 64, "v_head_dim": 32}  # whole blocks
_WHOLE_EXPERTS = {"moe_intermediate_size": 32}
_PERMUTED = {"llama", "granite", "granitemoe", "smollm3", "arcee", "olmo"}
_SHIFTED = {"gemma", "gemma2", "gemma3", "nemotron"}
# By case of the table of safetensors models: the GGUF architecture, its keys, and what must be
# another value because the file does not say it.
ROWS: dict[str, tuple[str, Callable[[Config], Keys], dict[str, Any]]] = {
    "llama": ("llama", _rope, {}),
    "llama-biases": ("llama", _rope, {}),
    "llama-rope-linear": ("llama", _rope, {}),
    "llama-rope-yarn": ("llama", _rope, {}),
    "llama-rope-llama3": ("llama", _rope, {}),
    "llama-one-kv-head": ("llama", _per_layer, {}),
    "mistral": ("llama", _rope, {}),
    "qwen2": ("qwen2", _rope, {}),
    "qwen3": ("qwen3", _rope, {}),
    "smollm3": ("smollm3", _rope, {"no_rope_layers": None, **_NO_ROPE_EVERY}),
    "granite": ("granite", _granite, {}),
    "granite-biases": ("granite", _granite, {"attention_multiplier": 0.3}),
    "seed_oss": ("seed_oss", _rope, {}),
    "seed_oss-qkv-bias": ("seed_oss", _rope, {}),
    "arcee": ("arcee", _rope, {}),
    "nemotron": ("nemotron", _partial, {}),
    "exaone4": ("exaone4", _rope, {}),
    "exaone4-window": ("exaone4", _exaone4, {}),
    "hunyuan": ("hunyuan-dense", _rope, {}),
    "hunyuan-alpha": ("hunyuan-dense", _hunyuan, {}),
    "ernie4_5": ("ernie4_5", _rope, {}),
    "glm4": ("glm4", _partial, {}),
    "olmo": ("olmo", _olmo, {"attention_bias": False}),
    "olmo-unclipped": ("olmo", _olmo, {}),
    "olmo2": ("olmo2", _rope, {}),
    "olmo3": ("olmo2", _olmo3, {}),
    "deepseek_v2": ("deepseek2", _deepseek, _LATENT),
    "deepseek_v2-yarn": ("deepseek2", _deepseek, _LATENT),
    "deepseek_v2-yarn-plain": ("deepseek2", _deepseek_mla, _LATENT),
    "deepseek_v3": (
        "deepseek2",
        _deepseek_mla,
        _LATENT | {"q_lora_rank": 64, "rope_parameters": YARN | MSCALE},
    ),
    "stablelm": ("stablelm", _partial, _TWO_HEADS),
    "stablelm-parallel": ("stablelm", _stablelm, _TWO_HEADS),
    "stablelm-qk-norm": ("stablelm", _stablelm, _TWO_HEADS),
    "starcoder2": ("starcoder2", _starcoder2, {}),
    "starcoder2-no-biases": ("starcoder2", _rope, {}),
    "cohere": ("command-r", _cohere, {}),
    "cohere-qk-norm": ("command-r", _cohere, {"attention_bias": False}),
    "cohere2": ("cohere2", _cohere, {}),
    "phi2": ("phi2", _partial, _TWO_HEADS),
    "phi3": ("phi3", _phi3, {}),
    "phi3-window-partial": ("phi3", _phi3, {}),
    "phi3-longrope": ("phi3", _phi3, {}),
    "phi3-longrope-short": ("phi3", _phi3, {}),
    "gemma": ("gemma", _rope, {}),
    "gemma2": ("gemma2", _gemma2, {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", _gemma3, {"query_pre_attn_scalar": 16}),
    "gemma3n": ("gemma3n", _gemma3n, _WHOLE_ALTUP),
    "gemma3-ropes-softcaps": ("gemma3", _gemma3, {"query_pre_attn_scalar": 32}),
    "mixtral": ("llama", _routed, {"sliding_window": None}),
    "qwen2-moe": (
        "qwen2moe",
        _routed,
        _WHOLE_EXPERTS | {"shared_expert_intermediate_size": 64, "mlp_only_layers": []},
    ),
    "qwen3-moe": ("qwen3moe", _routed, _WHOLE_EXPERTS | {"decoder_sparse_step": 1}),
    "deepseek_v2-experts": ("deepseek2", _softmax_deepseek, _LATENT | _WHOLE_EXPERTS),
    "deepseek_v2-groups": ("deepseek2", _softmax_deepseek, _LATENT | _WHOLE_EXPERTS),
    "deepseek_v3-experts": ("deepseek2", _sigmoid_deepseek, _LATENT | _WHOLE_EXPERTS),
    "deepseek_v3-one-group": ("deepseek2", _sigmoid_deepseek, _LATENT | _WHOLE_EXPERTS),
    "gpt-oss": ("gpt-oss", _gpt_oss, {}),
    "phimoe": ("phimoe", _windowed_experts, {"router_jitter_noise": 0.01}),
    "granitemoe": ("granitemoe", _granitemoe, {}),
    "granitemoe-shared": ("granitemoe", _granitemoe, {"shared_intermediate_size": 64}),
    "olmoe": ("olmoe", _routed, {"norm_topk_prob": False}),
    "glm4-moe": ("glm4moe", _glm4moe, _WHOLE_EXPERTS),
    "ernie4_5-moe": (
        "ernie4_5-moe",
        _ernie4_5_moe,
        _WHOLE_EXPERTS | {"moe_layer_end_index": -1},
    ),
    "hunyuan-moe": ("hunyuan-moe", _hunyuan_moe, {}),
}


def _one_tensor_an_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files of Mixtral were until April 2024."""
    found = {}
    for name, tensor in tensors.items():
        stem, exps, kind = name.rpartition("_exps.")
        parts = {f"{stem}.{i}.{kind}": part for i, part in enumerate(tensor)} if exps else {}
        found.update(parts or {name: tensor})
    return found


def _gate_and_up_as_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the converter writes them with ``--fuse-gate-up-exps``."""
    found = dict(tensors)
    for name in tensors:
        if "_gate_exps." in name:
            parts = found.pop(name), found.pop(name.replace("_gate_", "_up_"))
            found[name.replace("_gate_", "_gate_up_")] = torch.cat(parts, 1)
    return found


def _gate_of_one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files that other converters write."""
    return {
        name: tensor[None] if name.endswith("ffn_gate_inp_shexp.weight") else tensor
        for name, tensor in tensors.items()
    }


def _next_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a layer behind the last one, which predicts further tokens."""
    return tensors | {"blk.3.nextn.enorm.weight": torch.ones(8)}


# Other layouts of the same tensors, and the keys that change with them.
LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], Keys]] = {
    "mixtral": (_one_tensor_an_expert, {}),
    "qwen2-moe": (_gate_of_one_row, {}),
    "qwen3-moe": (_gate_and_up_as_one, {}),
    "gpt-oss": (_gate_and_up_as_one, {}),
    "glm4-moe": (_next_layer, {"block_count": 4, "nextn_predict_layers": 1}),
}


def _permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of the two halves of each head in turn (LlamaModel.permute of llama.cpp)."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _halves(weight: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Of kv_b_proj: ``[heads, latent, Dn]`` of the keys, ``[heads, Dv, latent]`` of the values
    (DeepseekV2Model.modify_tensors of llama.cpp)."""
    sizes = [config.qk_nope_head_dim, config.v_head_dim]
    k, v = weight.view(config.num_attention_heads, sum(sizes), -1).split(sizes, 1)
    return k.transpose(1, 2), v


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what is numbered in one tensor: the norms of the heads of q, and of k (StableLM), and
    the projections between streams (Gemma 3n)."""
    rows: dict[str, list[Tensor]] = {}
    for name in list(tensors):
        numbered = re.fullmatch(r"(.+?)(\.norms)?\.\d+\.weight", name)
        if numbered:
            rows.setdefault(numbered[1], []).append(tensors.pop(name))
    return tensors | {f"{name}.weight": torch.stack(parts) for name, parts in rows.items()}


def _merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the matrices of all experts in one tensor, one for each projection."""
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        numbered = re.fullmatch(r"(.+\.experts)\.\d+\.(\w+\.weight)", name)
        if numbered:
            parts.setdefault(".".join(numbered.groups()), []).append(tensors.pop(name))
    return tensors | {name: torch.stack(matrices) for name, matrices in parts.items()}


def _converted(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What the converter makes of one tensor, under names that the ``gguf`` package knows: gate
    and up apart, of GPT-OSS also out of their alternation and ``[out, in]``."""
    stem, _, last = name.rpartition(".")
    if name.endswith("block_sparse_moe.input_linear.weight"):
        stem = name.replace("input_linear.weight", "experts")
        names = f"{stem}.w1.weight", f"{stem}.w3.weight"
        return dict(zip(names, tensor.chunk(2, 1), strict=True))
    if name.endswith("shared_mlp.input_linear.weight"):
        stem = name.replace("shared_mlp.input_linear.weight", "mlp.shared_expert")
        names = f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"
        return dict(zip(names, tensor.chunk(2), strict=True))
    if stem.endswith("mlp.experts") and last.startswith(("gate_up_proj", "down_proj")):
        module, kind = last.removesuffix("_bias"), "bias" if last.endswith("bias") else "weight"
        rows = tensor if kind == "bias" else tensor.transpose(1, 2)
        if module == "down_proj":
            return {f"{stem}.down_proj.{kind}": rows}
        return {f"{stem}.gate_proj.{kind}": rows[:, ::2], f"{stem}.up_proj.{kind}": rows[:, 1::2]}
    if last == "sinks" or last.endswith("_scale"):
        return {f"{name}.weight": tensor}
    return {name.replace("correction_bias", "correction.bias"): tensor.squeeze()}


def _tensors(model: torch.nn.Module, architecture: str, halved: bool) -> dict[str, Tensor]:
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    published = revert_weight_conversion(model, model.state_dict())
    for name, tensor in _stacked(_merged(published)).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if architecture in _PERMUTED and module in heads:
            tensor = _permuted(tensor, heads[module])
        if architecture in _SHIFTED and name.endswith("norm.weight"):
            tensor = tensor + 1
        parts = _converted(name, tensor)
        if halved and module == "kv_b_proj":
            halves = zip(("k_b_proj", "v_b_proj"), _halves(tensor, config), strict=True)
            parts = {name.replace(module, half): part for half, part in halves}
        for part, data in parts.items():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            tensors[found] = data
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = torch.tensor(rope[f"{length}_factor"])
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    return tensors


_KEPT = ("norm", "altup", "laurel", "per_layer_model_proj", "bias", "ffn_gate_inp")
_KEPT += ("mlp.gate.", "router", "shared_expert_gate")  # transformers' names of routers


def _kept(name: str) -> bool:
    """Whether llama.cpp leaves a matrix as it is; ``name`` is transformers' or the file's."""
    return any(part in name for part in _KEPT)


def _kind_of(name: str, kind: Kind, config: Config) -> Kind:
    """Of files in MXFP4 only the experts are, if there are any."""
    routed = hasattr(config, "num_local_experts")
    return Q8_0 if kind is MXFP4 and routed and "exps" not in name else kind


def _rounded(matrix: Tensor, kind: Kind) -> Tensor:
    blocks = gguf.quants.quantize(matrix.contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind))


def _round_to(model: torch.nn.Module, kind: Kind, halved: bool) -> None:
    """Give every matrix values that the type holds exactly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if halved and "kv_b_proj" in name:
                for half in _halves(parameter, model.config):
                    half.copy_(_rounded(half, kind))
            elif model.config.model_type == "gpt_oss" and parameter.dim() == 3:
                rows = parameter.transpose(1, 2)
                rows.copy_(_rounded(rows, kind))
            elif parameter.dim() in (2, 3) and not _kept(name):
                parameter.copy_(_rounded(parameter, _kind_of(name, kind, model.config)))


def _unchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    architecture: str,
    keys: Keys,
    kind: Kind | None,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _unchanged,
) -> None:
    config = model.config
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
    }
    for key, names in _EPSILONS.items():
        for name in names:
            if hasattr(config, name):
                sizes[key] = getattr(config, name)
    writer = gguf.GGUFWriter(path, architecture)
    for suffix, value in (sizes | keys).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{architecture}.{suffix}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(SIZES["vocab_size"])])
    tensors = _tensors(model, architecture, "attention.key_length_mla" in keys)
    for name, tensor in layout(tensors).items():
        data = tensor.float().contiguous().numpy()
        if kind is not None and data.ndim > 1 and not _kept(name):
            own = _kind_of(name, kind, config)
            writer.add_tensor(name, gguf.quants.quantize(data, own), raw_dtype=own)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(
    case: str,
    kind: Kind | None,
    folder: Path,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _unchanged,
    more_keys: Keys | None = None,
) -> None:
    """Quantised, the weights are those of the reference, and activations are rounded to 16 bits."""
    architecture, read_keys, changes = ROWS[case]
    family, overrides = CASES[case]
    sizes = WHOLE_BLOCKS if kind else {}
    reference = save_random(folder / "hf", family, sizes | overrides | changes)
    keys = read_keys(reference.config) | (more_keys or {})
    if kind:
        _round_to(reference, kind, halved="attention.key_length_mla" in keys)
    path = folder / "model.gguf"
    write_gguf(path, reference, architecture, keys, kind, layout)
    ids = torch.randint(0, SIZES["vocab_size"], (TOKENS,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].float()
    checkpoint = Checkpoint(resolve(str(path)))
    model = checkpoint.decoder(torch.device("cpu"), torch.float32, TOKENS, NoProgress())
    found = sequence_logits(model, ids, TOKENS, block_size=8)
    limit = (1e-3 if kind else 1e-4) * expected.abs().max().item()
    assert (found - expected).abs().max().item() <= limit
    if not kind:
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def _name(value: object) -> str:
    return "f32" if value is None else str(getattr(value, "name", value)).lower()


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in ROWS for kind in (None, Q8_0)]
    + [("llama", MXFP4), ("gpt-oss", MXFP4)],
    ids=_name,
)
def test_logits_equal_transformers(case: str, kind: Kind | None, tmp_path: Path) -> None:
    _compare(case, kind, tmp_path)


@pytest.mark.parametrize("kind", [None, Q8_0], ids=_name)
@pytest.mark.parametrize("case", LAYOUTS)
def test_other_layouts(case: str, kind: Kind | None, tmp_path: Path) -> None:
    _compare(case, kind, tmp_path, *LAYOUTS[case])


def test_experts_that_are_missing(tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "2.ffn_up_exps" not in name}

    with pytest.raises(ModelLoadError, match=r"tensor blk\.2\.ffn_up_exps\.weight is missing"):
        _compare("mixtral", None, tmp_path, without)
    with pytest.raises(ModelLoadError, match=r"tensor blk\.1\.ffn_down\.4\.weight is missing"):
        _compare("mixtral", None, tmp_path, _without_one_expert)


def _without_one_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = _one_tensor_an_expert(tensors)
    del found["blk.1.ffn_down.4.weight"]
    return found
