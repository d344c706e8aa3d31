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
_PERMUTED = {"llama", "granite", "smollm3", "arcee", "olmo"}
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


def _tensors(model: torch.nn.Module, architecture: str, halved: bool) -> dict[str, Tensor]:
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in _stacked(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if architecture in _PERMUTED and module in heads:
            tensor = _permuted(tensor, heads[module])
        if architecture in _SHIFTED and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("_scale"):
            name += ".weight"
        parts = {name: tensor}
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


def _kept(name: str) -> bool:
    """Whether llama.cpp leaves a matrix as it is."""
    return any(part in name for part in ("norm", "altup", "laurel", "per_layer_model_proj"))


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
            elif parameter.dim() == 2 and not _kept(name):
                parameter.copy_(_rounded(parameter, kind))


def write_gguf(
    path: Path, model: torch.nn.Module, architecture: str, keys: Keys, kind: Kind | None
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
    for name, tensor in _tensors(model, architecture, "attention.key_length_mla" in keys).items():
        data = tensor.float().contiguous().numpy()
        if kind is not None and data.ndim > 1 and not _kept(name):
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in ROWS for kind in (None, Q8_0)] + [("llama", MXFP4)],
    ids=lambda value: "f32" if value is None else str(getattr(value, "name", value)).lower(),
)
def test_logits_equal_transformers(case: str, kind: Kind | None, tmp_path: Path) -> None:
    """Quantised, the weights are those of the reference, and activations are rounded to 16 bits."""
    architecture, keys, changes = ROWS[case]
    family, overrides = CASES[case]
    sizes = WHOLE_BLOCKS if kind else {}
    reference = save_random(tmp_path / "hf", family, sizes | overrides | changes)
    if kind:
        _round_to(reference, kind, halved=keys is _deepseek_mla)
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, architecture, keys(reference.config), kind)
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
