"""DeepSeek-V2 and V2-Lite: latent attention, whose YaRN also raises the attention scale, and
experts behind the first layers."""

from squall.models.common import read_activation, read_rope
from squall.models.config import (
    ConfigReader,
    DecoderConfig,
    LayerConfig,
    MLAConfig,
    RopeConfig,
    RouterConfig,
)
from squall.models.deepseek_experts import with_experts
from squall.models.rope import yarn_magnitude

_LIMITED = {"greedy": False, "group_limited_greedy": True}  # topk_method: to the best groups?


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = read_dense(reader)
    if not has_experts(config, reader, "softmax"):
        return config
    return with_experts(config, reader, _read_router(reader))


def has_experts(config: DecoderConfig, reader: ConfigReader, scoring: str) -> bool:
    """Whether layers from ``first_k_dense_replace`` on have experts, as all published models do;
    they must be scored with ``scoring``."""
    if reader.get_int("first_k_dense_replace", 0) >= config.num_layers:
        return False
    found = reader.get_str("scoring_func", scoring)
    if found != scoring:
        raise reader.fail("scoring_func", f"{found!r} is not supported; accepted: {scoring}")
    if reader.get_int("moe_layer_freq", 1) != 1:
        raise reader.fail("moe_layer_freq", "only 1 is supported")
    return True


def _read_router(reader: ConfigReader) -> RouterConfig:
    """Softmax scores; a group is as good as its best expert."""
    method = reader.get_str("topk_method", "greedy")
    if method not in _LIMITED:
        accepted = ", ".join(_LIMITED)
        raise reader.fail("topk_method", f"{method!r} is not known; accepted: {accepted}")
    if reader.get_bool("norm_topk_prob", False):
        raise reader.fail("norm_topk_prob", "is not supported")
    return RouterConfig(
        top_k=reader.get_int("num_experts_per_tok"),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        groups=(reader.get_int("n_group", 1) or 1) if _LIMITED[method] else 1,
        top_groups=(reader.get_int("topk_group", 1) or 1) if _LIMITED[method] else 1,
    )


def read_dense(reader: ConfigReader) -> DecoderConfig:
    """The model with dense layers only."""
    mla = read_mla(reader)
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    rope = read_rope(reader, mla.qk_rope_head_dim)
    bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"),
        hidden_size=reader.get_int("hidden_size"),
        intermediate_size=reader.get_int("intermediate_size"),
        num_heads=reader.get_int("num_attention_heads"),
        num_kv_heads=1,
        head_dim=head_dim,
        max_position=reader.get_int("max_position_embeddings"),
        norm_eps=reader.get_float("rms_norm_eps", 1e-6),
        layers=(LayerConfig(),) * reader.get_int("num_hidden_layers"),
        ropes=(rope,),
        tie_embeddings=reader.get_bool("tie_word_embeddings", False),
        attention_scale=head_dim**-0.5 * _scale_factor(rope),
        activation=read_activation(reader),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
        interleaved_rope=True,
        mla=mla,
    )


def read_mla(reader: ConfigReader) -> MLAConfig:
    """Raises the reader's error for sizes that make no attention."""
    rotary = reader.get_int("qk_rope_head_dim")
    if rotary % 2:
        raise reader.fail("qk_rope_head_dim", f"{rotary} is odd; pairs of elements are rotated")
    return MLAConfig(
        q_lora_rank=reader.get_int("q_lora_rank", None),
        kv_lora_rank=reader.get_int("kv_lora_rank"),
        qk_nope_head_dim=reader.get_int("qk_nope_head_dim"),
        qk_rope_head_dim=rotary,
        v_head_dim=reader.get_int("v_head_dim"),
    )


def _scale_factor(rope: RopeConfig) -> float:
    """transformers' ``yarn_apply_mscale``: the correction of the scores, on queries and on keys."""
    weight = rope.settings.get("mscale_all_dim")
    if rope.rule == "default" or not weight:
        return 1.0
    return yarn_magnitude(float(rope.settings["factor"]), float(weight)) ** 2
