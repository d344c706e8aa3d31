"""What GGUF metadata says about mixtures of experts, as entries of transformers' configs.

Keys: llama.cpp's ``llama-arch.cpp``; what each architecture does with them, and what it takes for
granted: its model files (``src/models``) and its converter.
"""

from typing import Any

from squall.loaders.gguf_source import Source

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


def _counts(source: Source) -> tuple[int, int]:
    """Experts of a layer, and those a token goes through."""
    experts, used = source.size("expert_count"), source.size("expert_used_count")
    if used > experts:
        raise source.fail("expert_used_count", f"{used} of {experts} experts")
    return experts, used


def _counted(source: Source, experts_key: str, used_key: str) -> dict[str, Any]:
    return dict(zip((experts_key, used_key), _counts(source), strict=True))


def _local(source: Source) -> dict[str, Any]:
    return _counted(source, "num_local_experts", "num_experts_per_tok")


def llama(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """With experts it is Mixtral."""
    if not source.size("expert_count", 0, minimum=0):
        return {}
    named = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return named | _local(source)


def _qwen(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    counts = _counted(source, "num_experts", "num_experts_per_tok")
    share = config["intermediate_size"] // counts["num_experts_per_tok"]
    size = source.size("expert_feed_forward_length", max(share, 1))
    return counts | {"moe_intermediate_size": size}


def qwen2moe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    shared = source.size("expert_shared_feed_forward_length", config["intermediate_size"])
    return _qwen(source, config) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": shared,
    }


def qwen3moe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return _qwen(source, config) | {"norm_topk_prob": True}


def deepseek2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """With sigmoid scores it is DeepSeek V3 (Kimi K2 is one as well)."""
    if not source.size("expert_count", 0, minimum=0):
        layers = config["num_hidden_layers"]
        dense = source.size("leading_dense_block_count", layers, minimum=0)
        return {"first_k_dense_replace": dense}
    gating = source.size("expert_gating_func", _SOFTMAX, minimum=0) or _SOFTMAX
    found = _deepseek(source)
    if gating == _SIGMOID:
        return found | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    if gating != _SOFTMAX:
        raise source.fail("expert_gating_func", f"{gating} is not 1 (softmax) or 2 (sigmoid)")
    limited = found["n_group"] > 1
    return found | {"topk_method": "group_limited_greedy" if limited else "greedy"}


def _deepseek(source: Source) -> dict[str, Any]:
    """What all models with DeepSeek's experts have; a scale of 0 stands for none."""
    groups = source.size("expert_group_count", 1, minimum=0) or 1
    best = source.size("expert_group_used_count", groups, minimum=0) or groups
    if best > groups:
        raise source.fail("expert_group_used_count", f"{best} of {groups} groups")
    scaled = source.file.get_float(source.key("expert_weights_scale"), 0.0) != 0.0
    return _counted(source, "n_routed_experts", "num_experts_per_tok") | {
        "moe_intermediate_size": source.size("expert_feed_forward_length"),
        "n_shared_experts": source.size("expert_shared_count", 0, minimum=0),
        "first_k_dense_replace": source.size("leading_dense_block_count", 0, minimum=0),
        "routed_scaling_factor": source.positive("expert_weights_scale") if scaled else 1.0,
        "norm_topk_prob": source.flag("expert_weights_norm"),
        "n_group": groups,
        "topk_group": best,
    }


def glm4moe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    gating = source.size("expert_gating_func", _SIGMOID, minimum=0) or _SIGMOID
    if gating != _SIGMOID:
        raise source.fail("expert_gating_func", f"{gating} is not 2 (sigmoid)")
    return _deepseek(source) | {
        "use_qk_norm": source.has_head_norms(),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
    }


def gpt_oss(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """YaRN without rounding of its bounds; the windows are those of the architecture."""
    scaling = config["rope_scaling"]
    if scaling and scaling["rope_type"] == "yarn":
        scaling = scaling | {"truncate": False}
    size = source.size("expert_feed_forward_length", config["intermediate_size"])
    return _local(source) | {
        "intermediate_size": size,
        "sliding_window": source.size("attention.sliding_window"),
        "rope_scaling": scaling,
    }


def phimoe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    window = source.size("attention.sliding_window", 0, minimum=0) or None
    head = "output.bias" in source.file.tensors
    return _local(source) | {"sliding_window": window, "lm_head_bias": head}


def granitemoe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """With a shared MLP it has a name of its own."""
    shared = source.size("expert_shared_feed_forward_length", 0, minimum=0)
    if not shared:
        return _local(source)
    return _local(source) | {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": shared,
    }


def olmoe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return _counted(source, "num_experts", "num_experts_per_tok") | {
        "norm_topk_prob": False,
        "clip_qkv": source.file.get_float(source.key("attention.clamp_kqv"), 0.0) or None,
    }


def ernie4_5_moe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return _counted(source, "moe_num_experts", "moe_k") | {
        "moe_intermediate_size": source.size("expert_feed_forward_length"),
        "moe_num_shared_experts": source.size("expert_shared_count", 0, minimum=0),
        "moe_layer_start_index": source.size("leading_dense_block_count", 0, minimum=0),
        "moe_layer_interval": source.size("interleave_moe_layer_step", 1),
        "use_bias": config["attention_bias"],
    }


def hunyuan_moe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Experts and the shared MLP have one size in transformers."""
    size = config["intermediate_size"]
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        if (found := source.size(key, size)) != size:
            raise source.fail(key, f"{found} is not feed_forward_length, {size}: not supported")
    return _counted(source, "num_experts", "moe_topk")
