"""GGUF metadata as the ``config.json`` that transformers would write for the same model.

What a file leaves out gets llama.cpp's default. What is an architecture's own is in
:mod:`squall.loaders.gguf_architectures`. Key names: ggml's docs/gguf.md and llama.cpp's
``llama-arch.cpp``; defaults: its ``load_hparams``.
"""

import difflib
import math
from typing import Any

from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_architectures import ARCHITECTURES
from squall.loaders.gguf_source import Source

_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG, _ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_LAYERS_LIMIT = 512  # llama.cpp's LLAMA_MAX_LAYERS


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
