"""GGUF metadata as the ``config.json`` that transformers would write for the same model.

What a file leaves out gets llama.cpp's default. A new architecture is a row of ``ARCHITECTURES``
(and one of ``gguf_names.NAME_MAPS``). Key names: ggml's docs/gguf.md and llama.cpp's
``llama-arch.cpp``; defaults: its ``load_hparams``.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

from squall.loaders import gguf_experts
from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_source import Source

_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG, _ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_LAYERS_LIMIT = 512  # llama.cpp's LLAMA_MAX_LAYERS


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


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The config of the model in ``file``, with transformers' keys (4.x spelling).

    ``rope_scaling`` of a file with a ``rope_freqs.weight`` tensor is
    ``{"rope_type": "factors", "factors": [...], "tensor": "rope_freqs.weight"}``: each rotary
    frequency is divided by its factor. ModelLoadError: an architecture or a setting that is not
    supported, or a key that is missing or makes no sense.
    """
    name = file.get_str("general.architecture")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        near = difflib.get_close_matches(name, ARCHITECTURES, 1, 0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ModelLoadError(
            f"{file.path}: GGUF architecture {name[:80]!r} is not supported{hint}; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    source = Source(file, name)
    if source.size("expert_count", 0, minimum=0) and not architecture.experts:
        raise source.fail("expert_count", f"experts are not supported in {name}")
    sizes = _sizes(source, architecture.latent)
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        **architecture.fixed,
        **sizes,
        **_rope(source, sizes["head_dim"], architecture.partial_rotary),
        **_tensors_say(file),
        architecture.epsilon: source.positive(
            "attention.layer_norm_rms_epsilon"
            if architecture.epsilon == "rms_norm_eps"
            else "attention.layer_norm_epsilon"
        ),
    }
    for key, entry in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        token = file.get_int(f"tokenizer.ggml.{entry}_token_id", None)
        if token is not None:
            config[key] = token
    return config | (architecture.extend(source, config) if architecture.extend else {})


def _sizes(source: Source, latent: bool) -> dict[str, Any]:
    hidden = source.size("embedding_length")
    layers = _layers(source)
    heads = source.size("attention.head_count")
    kv_heads = source.size("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise source.fail("attention.head_count_kv", f"{kv_heads} does not divide {heads} heads")
    per_head = _latent_heads(source) if latent else _plain_heads(source, hidden // heads)
    return {
        "vocab_size": _vocab_size(source),
        "hidden_size": hidden,
        "intermediate_size": source.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if latent else kv_heads,
        **per_head,
        "max_position_embeddings": source.size("context_length"),
    }


def _layers(source: Source) -> int:
    """Layers but the last ones that predict further tokens, which no model here computes."""
    layers = source.size("block_count")
    if layers > _LAYERS_LIMIT:
        raise source.fail("block_count", f"{layers} layers; at most {_LAYERS_LIMIT} are accepted")
    further = source.size("nextn_predict_layers", 0, minimum=0)
    if further >= layers:
        raise source.fail("nextn_predict_layers", f"{further} of {layers} layers")
    return layers - further


def _plain_heads(source: Source, default: int) -> dict[str, Any]:
    head_dim = source.size("attention.key_length", default)
    if (value := source.size("attention.value_length", head_dim)) != head_dim:
        message = f"{value} is not the head size {head_dim}: not supported"
        raise source.fail("attention.value_length", message)
    return {"head_dim": head_dim}


def _latent_heads(source: Source) -> dict[str, Any]:
    """Latent attention. Since the middle of 2025 ``key_length`` and ``value_length`` are those of
    the cache, with one kv head, and the heads' own lengths have keys of their own."""
    suffix = "_mla" if source.has("attention.key_length_mla") else ""
    rotary = source.size("rope.dimension_count")
    key = source.size(f"attention.key_length{suffix}")
    if rotary >= key:
        raise source.fail("rope.dimension_count", f"{rotary} is not below the head size {key}")
    queries = source.size("attention.q_lora_rank", 0, minimum=0)
    return {
        "head_dim": rotary,  # transformers' for a rotated part of this size
        "q_lora_rank": queries or None,
        "kv_lora_rank": source.size("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": source.size(f"attention.value_length{suffix}"),
    }


def _vocab_size(source: Source) -> int:
    """Rows of the embedding; in a file without weights what the metadata says."""
    file = source.file
    tokens = len(file.get_list("tokenizer.ggml.tokens", []))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        return source.size("vocab_size", tokens or None)
    rows = embedding.shape[0]
    if len(embedding.shape) != 2 or rows < tokens:
        raise ModelLoadError(
            f"{file.path}: tensor 'token_embd.weight' has shape {list(embedding.shape)}, the "
            f"vocabulary {tokens} tokens"
        )
    return rows


def _rope(source: Source, head_dim: int, partial: bool) -> dict[str, Any]:
    """``partial``: only the first elements of a head may be rotated."""
    rotary = source.size("rope.dimension_count", head_dim)
    if rotary != head_dim and not (partial and rotary < head_dim):
        message = f"{rotary} is not the head size {head_dim}: not supported"
        raise source.fail("rope.dimension_count", message)
    theta = source.positive("rope.freq_base", 10000.0)
    kind = source.file.get_str(source.key("rope.scaling.type"), "linear")
    old = source.file.get_float(source.key("rope.scale_linear"), 0.0)
    factor = source.file.get_float(source.key("rope.scaling.factor"), old) or 1.0
    if not (math.isfinite(factor) and factor > 0):
        raise source.fail("rope.scaling.factor", f"{factor} is not a number above 0")
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = _yarn(source, factor)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    elif kind != "none" and _ROPE_LONG not in source.file.tensors:
        raise source.fail("rope.scaling.type", f"{kind!r} is not one of none, linear, yarn")
    if _ROPE_FREQS in source.file.tensors:
        if scaling is not None:
            raise source.fail(
                "rope.scaling.type", f"{kind!r} together with tensor {_ROPE_FREQS!r}: not supported"
            )
        factors = _divisors(source.file, _ROPE_FREQS, rotary // 2)
        scaling = {"rope_type": "factors", "factors": factors, "tensor": _ROPE_FREQS}
    elif _ROPE_LONG in source.file.tensors:
        scaling = _longrope(source, rotary // 2)
    config = {"rope_theta": theta, "rope_scaling": scaling}
    return config if rotary == head_dim else config | {"partial_rotary_factor": rotary / head_dim}


def _longrope(source: Source, count: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": _divisors(source.file, _ROPE_LONG, count),
        "short_factor": _divisors(source.file, _ROPE_SHORT, count),
        "attention_factor": source.positive("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": source.size(
            "rope.scaling.original_context_length", source.size("context_length")
        ),
    }


def _yarn(source: Source, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies cos and sin by ``(1 + 0.1 ln factor) * rope.scaling.attn_factor``."""
    if source.positive("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise source.fail("rope.scaling.yarn_ext_factor", "only 1 is supported")
    attention = source.positive("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": source.size(
            "rope.scaling.original_context_length", source.size("context_length")
        ),
        "beta_fast": source.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": source.positive("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": attention * (1.0 + 0.1 * math.log(max(factor, 1.0))),
    }


def _divisors(file: GGUFFile, tensor: str, count: int) -> list[float]:
    """Divisors of the ``count`` rotary frequencies: llama.cpp's form of Llama 3's scaling, and of
    LongRoPE's."""
    if tensor not in file.tensors:
        raise ModelLoadError(f"{file.path}: tensor {tensor} is missing")
    factors: list[float] = file.dense(tensor).flatten().tolist()
    if len(factors) != count:
        raise ModelLoadError(
            f"{file.path}: tensor {tensor!r} has {len(factors)} values; the head size asks "
            f"for {count}"
        )
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelLoadError(f"{file.path}: tensor {tensor!r} has values that are not above 0")
    return factors


def _tensors_say(file: GGUFFile) -> dict[str, Any]:
    """Settings that GGUF expresses by which tensors there are."""
    return {
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


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


def _has_head_norms(source: Source) -> bool:
    return "blk.0.attn_q_norm.weight" in source.file.tensors


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
        "qk_layernorm": _has_head_norms(source),
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
        "use_qk_norm": _has_head_norms(source),
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
