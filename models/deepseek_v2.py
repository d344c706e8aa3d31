"""DeepSeek-V2 and V2-Lite: latent attention, whose YaRN also raises the attention scale."""

from squall.models.common import read_activation, read_rope
from squall.models.config import ConfigReader, DecoderConfig, LayerConfig, MLAConfig, RopeConfig
from squall.models.rope import yarn_magnitude


def read_config(reader: ConfigReader) -> DecoderConfig:
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
        layers=_read_layers(reader),
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


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    """All dense: layers from ``first_k_dense_replace`` on would have experts."""
    count = reader.get_int("num_hidden_layers")
    dense = reader.get_int("first_k_dense_replace", 0)
    if dense < count:
        message = f"{dense} of {count} layers are dense; layers with experts are not supported"
        raise reader.fail("first_k_dense_replace", message)
    return (LayerConfig(),) * count


def _scale_factor(rope: RopeConfig) -> float:
    """transformers' ``yarn_apply_mscale``: the correction of the scores, on queries and on keys."""
    weight = rope.settings.get("mscale_all_dim")
    if rope.rule == "default" or not weight:
        return 1.0
    return yarn_magnitude(float(rope.settings["factor"]), float(weight)) ** 2
