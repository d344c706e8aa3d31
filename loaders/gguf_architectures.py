"""The architectures of GGUF files: what each adds to the config that all have
(:mod:`squall.loaders.gguf_config`).

A new one is a row of ``ARCHITECTURES`` (and one of ``gguf_names.NAME_MAPS``). Key names and
defaults: llama.cpp's ``llama-arch.cpp`` and ``load_hparams``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

from squall.loaders import gguf_experts
from squall.loaders.gguf_source import Source


@dataclass(frozen=True)
class Architecture:
    """One value of ``general.architecture``."""

    hf_class: str
    model_type: str
    fixed: Mapping[str, Any] = field(default_factory=dict)  # config entries no key speaks about
    extend: Callable[["Source", dict[str, Any]], dict[str, Any]] | None = None
    partial_rotary: bool = False  # a part of each head may be rotated
    epsilon: str = "rms_norm_eps"  # the config's key of the norms' epsilon
    latent: bool = False  # multi-head latent attention
    experts: bool = False  # ``extend`` reads those that a file has or must have


def _softcap(source: Source, suffix: str, default: float) -> float | None:
    """A softcap; None for 0, which means none."""
    return source.file.get_float(source.key(suffix), default) or None


def _extend_gemma2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp tells the 27B model, whose scale goes by ``hidden / heads``, by its 46 layers."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": source.size("attention.sliding_window", 4096),
        "query_pre_attn_scalar": (
            per_head if config["num_hidden_layers"] == 46 else config["head_dim"]
        ),
        "attn_logit_softcapping": _softcap(source, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _softcap(source, "final_logit_softcapping", 30.0),
    }


def _extend_granite(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": source.positive("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": source.positive("embedding_scale", 1.0),
        "residual_multiplier": source.positive("residual_scale", 1.0),
        "logits_scaling": source.positive("logit_scale", 1.0),
    }


def _extend_granitemoe(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return _extend_granite(source, config) | gguf_experts.granitemoe(source, config)


def _extend_deepseek2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Experts, and what YaRN does to the scores.

    The converter writes a tenth of ``mscale_all_dim``; llama.cpp takes ``mscale`` to be the same.
    """
    if source.has("attention.temperature_scale"):  # Mistral Large 3
        raise source.fail("attention.temperature_scale", "is not supported")
    found = gguf_experts.deepseek2(source, config)
    scaling = config["rope_scaling"]
    weighted = source.has("rope.scaling.yarn_log_multiplier")
    if weighted and scaling and scaling["rope_type"] == "yarn":
        if source.positive("rope.scaling.attn_factor", 1.0) != 1.0:
            raise source.fail("rope.scaling.attn_factor", "only 1 is supported")
        weight = source.positive("rope.scaling.yarn_log_multiplier") * 10
        scaling = {key: value for key, value in scaling.items() if key != "attention_factor"}
        found["rope_scaling"] = scaling | {"mscale": weight, "mscale_all_dim": weight}
    return found


def _extend_olmo(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return {"clip_qkv": source.file.get_float(source.key("attention.clamp_kqv"), 0.0) or None}


def _extend_olmo2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """With a window it is OLMo 3."""
    window = source.size("attention.sliding_window", 0, minimum=0)
    if not window:
        return {}
    sliding = _sliding_layers(source, config["num_hidden_layers"], period=4)
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": window,
        "rope_local_base_freq": config["rope_theta"],
    }


def _extend_biased(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """One switch for all biases."""
    return {"use_bias": config["attention_bias"]}


def _extend_windowed(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """All layers with a window, or none."""
    return {"sliding_window": source.size("attention.sliding_window", 0, minimum=0) or None}


def _extend_starcoder2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return _extend_biased(source, config) | _extend_windowed(source, config)


def _extend_stablelm(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_qkv_bias": config["attention_bias"],
        "use_parallel_residual": source.flag("use_parallel_residual"),
        "qk_layernorm": source.has_head_norms(),
    }


def _extend_seed_oss(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_out_bias": "blk.0.attn_output.bias" in source.file.tensors}


def _extend_exaone4(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp knows the model with windows by its 64 layers."""
    layers = config["num_hidden_layers"]
    window = source.size("attention.sliding_window", 4096 if layers == 64 else 0, minimum=0)
    if not window:
        return {}
    sliding = _sliding_layers(source, layers, period=4)
    return {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": window,
    }


def _extend_command_r(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "logit_scale": source.positive("logit_scale"),
        "use_qk_norm": source.has_head_norms(),
    }


def _extend_cohere2(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    sliding = _sliding_layers(source, config["num_hidden_layers"], period=4)
    return _extend_command_r(source, config) | {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": source.size("attention.sliding_window"),
    }


def _extend_gemma3(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Sliding layers, their rope base and the attention scale.

    llama.cpp tells the 27B model, whose scale goes by ``hidden / heads``, by its 62 layers.
    """
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    largest = layers == 62
    window = source.size("attention.sliding_window", 0, minimum=0)
    sliding = _sliding_layers(source, layers, period=6) if window else [False] * layers
    return {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": window or None,
        "rope_local_base_freq": source.positive("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
        ),
        "final_logit_softcapping": _softcap(source, "final_logit_softcapping", 0.0),
    }


_GEMMA3N_SIZES = {  # rows of tensors
    "laurel_rank": "blk.0.laurel_l.weight",
    "vocab_size_per_layer_input": "per_layer_token_embd.weight",
}


def _extend_gemma3n(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """The sparsity is given as the deviations above the mean from which gates are open."""
    layers, tensors = config["num_hidden_layers"], source.file.tensors
    sliding = _sliding_layers(source, layers, period=5)
    told: dict[str, Any] = {
        key: tensors[name].shape[0] for key, name in _GEMMA3N_SIZES.items() if name in tensors
    }
    if source.has("activation_sparsity_scale"):
        deviations = source.file.get_list(source.key("activation_sparsity_scale"))
        if not all(isinstance(value, float) for value in deviations):
            raise source.fail("activation_sparsity_scale", "is not an array of numbers")
        told["activation_sparsity_pattern"] = [NormalDist().cdf(value) for value in deviations]
    shared = source.size("attention.shared_kv_layers", max(0, layers - 20), minimum=0)
    return told | {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": source.size("attention.sliding_window"),
        "rope_local_base_freq": source.positive("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": _softcap(source, "final_logit_softcapping", 30.0),
        "num_kv_shared_layers": shared,
        "altup_num_inputs": source.size("altup.num_inputs", 4),
        "altup_active_idx": source.size("altup.active_idx", 0, minimum=0),
        "hidden_size_per_layer_input": source.size("embedding_length_per_layer_input", 256),
    }


def _sliding_layers(source: Source, layers: int, period: int) -> list[bool]:
    """Which layers have a window: flags, or all but every n-th layer (by default ``period``)."""
    key = source.key("attention.sliding_window_pattern")
    if isinstance(source.file.metadata.get(key), int | None):
        period = source.size("attention.sliding_window_pattern", period, minimum=0)
        return [period == 0 or i % period < period - 1 for i in range(layers)]
    flags = source.file.get_list(key)
    if len(flags) != layers:
        raise source.fail(
            "attention.sliding_window_pattern", f"{len(flags)} flags for {layers} layers"
        )
    return [bool(flag) for flag in flags]


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            "LlamaForCausalLM", "llama", {"hidden_act": "silu"}, gguf_experts.llama, experts=True
        ),
        "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", {"hidden_act": "silu"}),
        "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", {"hidden_act": "silu"}),
        "granite": Architecture(
            "GraniteForCausalLM", "granite", {"hidden_act": "silu"}, _extend_granite
        ),
        "smollm3": Architecture(
            "SmolLM3ForCausalLM", "smollm3", {"hidden_act": "silu", "no_rope_layer_interval": 4}
        ),
        "phi2": Architecture(
            "PhiForCausalLM",
            "phi",
            {"hidden_act": "gelu_new"},
            partial_rotary=True,
            epsilon="layer_norm_eps",
        ),
        "phi3": Architecture(
            "Phi3ForCausalLM", "phi3", {"hidden_act": "silu"}, _extend_windowed, partial_rotary=True
        ),
        "glm4": Architecture(
            "Glm4ForCausalLM", "glm4", {"hidden_act": "silu"}, partial_rotary=True
        ),
        "olmo": Architecture(
            "OlmoForCausalLM",
            "olmo",
            {"hidden_act": "silu"},
            _extend_olmo,
            epsilon="layer_norm_eps",
        ),
        "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", {"hidden_act": "silu"}, _extend_olmo2),
        "deepseek2": Architecture(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            {"hidden_act": "silu"},
            _extend_deepseek2,
            latent=True,
            experts=True,
        ),
        "qwen2moe": Architecture(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            {"hidden_act": "silu"},
            gguf_experts.qwen2moe,
            experts=True,
        ),
        "qwen3moe": Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            {"hidden_act": "silu"},
            gguf_experts.qwen3moe,
            experts=True,
        ),
        "gpt-oss": Architecture(
            "GptOssForCausalLM", "gpt_oss", extend=gguf_experts.gpt_oss, experts=True
        ),
        "phimoe": Architecture(
            "PhimoeForCausalLM",
            "phimoe",
            {"hidden_act": "silu"},
            gguf_experts.phimoe,
            experts=True,
        ),
        "granitemoe": Architecture(
            "GraniteMoeForCausalLM",
            "granitemoe",
            {"hidden_act": "silu"},
            _extend_granitemoe,
            experts=True,
        ),
        "olmoe": Architecture(
            "OlmoeForCausalLM",
            "olmoe",
            {"hidden_act": "silu"},
            gguf_experts.olmoe,
            experts=True,
        ),
        "glm4moe": Architecture(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            {"hidden_act": "silu"},
            gguf_experts.glm4moe,
            partial_rotary=True,
            experts=True,
        ),
        "ernie4_5-moe": Architecture(
            "Ernie4_5_MoeForCausalLM",
            "ernie4_5_moe",
            {"hidden_act": "silu"},
            gguf_experts.ernie4_5_moe,
            experts=True,
        ),
        "hunyuan-moe": Architecture(
            "HunYuanMoEV1ForCausalLM",
            "hunyuan_v1_moe",
            {"hidden_act": "silu"},
            gguf_experts.hunyuan_moe,
            experts=True,
        ),
        "ernie4_5": Architecture(
            "Ernie4_5ForCausalLM", "ernie4_5", {"hidden_act": "silu"}, _extend_biased
        ),
        "arcee": Architecture("ArceeForCausalLM", "arcee", {"hidden_act": "relu2"}),
        "nemotron": Architecture(
            "NemotronForCausalLM",
            "nemotron",
            {"hidden_act": "relu2"},
            partial_rotary=True,
            epsilon="norm_eps",
        ),
        "seed_oss": Architecture(
            "SeedOssForCausalLM", "seed_oss", {"hidden_act": "silu"}, _extend_seed_oss
        ),
        "exaone4": Architecture(
            "Exaone4ForCausalLM", "exaone4", {"hidden_act": "silu"}, _extend_exaone4
        ),
        "hunyuan-dense": Architecture(
            "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", {"hidden_act": "silu"}
        ),
        "stablelm": Architecture(
            "StableLmForCausalLM",
            "stablelm",
            {"hidden_act": "silu"},
            _extend_stablelm,
            partial_rotary=True,
            epsilon="layer_norm_eps",
        ),
        "starcoder2": Architecture(
            "Starcoder2ForCausalLM",
            "starcoder2",
            {"hidden_act": "gelu_pytorch_tanh"},
            _extend_starcoder2,
            epsilon="norm_epsilon",
        ),
        "command-r": Architecture(
            "CohereForCausalLM",
            "cohere",
            {"hidden_act": "silu"},
            _extend_command_r,
            epsilon="layer_norm_eps",
        ),
        "cohere2": Architecture(
            "Cohere2ForCausalLM",
            "cohere2",
            {"hidden_act": "silu"},
            _extend_cohere2,
            epsilon="layer_norm_eps",
        ),
        "gemma": Architecture(
            "GemmaForCausalLM", "gemma", {"hidden_activation": "gelu_pytorch_tanh"}
        ),
        "gemma2": Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            {"hidden_activation": "gelu_pytorch_tanh"},
            _extend_gemma2,
        ),
        "gemma3n": Architecture(
            "Gemma3nForCausalLM",
            "gemma3n_text",
            {"hidden_activation": "gelu_pytorch_tanh"},
            _extend_gemma3n,
        ),
        "gemma3": Architecture(
            "Gemma3ForCausalLM",
            "gemma3_text",
            {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
            _extend_gemma3,
        ),
    }
)
"""By ``general.architecture``."""
