"""Llama 4 text: layers with rope see their chunk of the context, each fourth sees everything and
knows no positions; in some layers or all one expert for each token, beside an MLP for all."""

from dataclasses import replace

from squall.models.common import read_activation, read_heads, read_no_ropes, read_rope
from squall.models.config import (
    ConfigReader,
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    QueryGrowth,
    RouterConfig,
)

_KINDS = ("full_attention", "chunked_attention")


def _read_windows(reader: ConfigReader, ropes: list[int]) -> list[int]:
    """Each layer's window: ``layer_types`` when given, else chunks where ``ropes`` is 0."""
    chunk = reader.get_int("attention_chunk_size", 8192)
    if chunk < 1:
        raise reader.fail("attention_chunk_size", f"{chunk} is not accepted; at least 1 is")
    kinds = reader.get_list("layer_types", None) or [_KINDS[rope == 0] for rope in ropes]
    if len(kinds) != len(ropes):
        raise reader.fail("layer_types", f"{len(kinds)} entries for {len(ropes)} layers")
    for kind in kinds:
        if kind not in _KINDS:
            accepted = ", ".join(_KINDS)
            raise reader.fail("layer_types", f"{kind!r} is not known; accepted: {accepted}")
    return [-chunk if kind == "chunked_attention" else 0 for kind in kinds]


def _read_growth(reader: ConfigReader) -> QueryGrowth | None:
    """Of layers that know no positions (temperature tuning)."""
    if not reader.get_bool("attn_temperature_tuning", True):
        return None
    every = reader.get_int("floor_scale", 8192)
    if every < 1:
        raise reader.fail("floor_scale", f"{every} is not accepted; at least 1 is")
    return QueryGrowth(reader.get_float("attn_scale", 0.1), every, ahead=1)


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    count = reader.get_int("num_hidden_layers")
    ropes = read_no_ropes(reader, count)
    norm, growth = reader.get_bool("use_qk_norm", True), _read_growth(reader)
    step = reader.get_int("interleave_moe_layer_step", 1)
    if step < 1:
        raise reader.fail("interleave_moe_layer_step", f"{step} is not accepted; at least 1 is")
    experts = reader.get_list("moe_layers", range(step - 1, count, step))
    return tuple(
        LayerConfig(
            window,
            rope,
            experts=i in experts,
            unit_qk_norm=norm and rope == 0,
            query_growth=growth if rope == 1 else None,
        )
        for i, (window, rope) in enumerate(zip(_read_windows(reader, ropes), ropes, strict=True))
    )


def _read_experts(reader: ConfigReader) -> MoEConfig:
    top_k = reader.get_int("num_experts_per_tok", 1)
    if top_k != 1:  # what goes into an expert is scaled for it
        raise reader.fail("num_experts_per_tok", f"{top_k} is not supported; accepted: 1")
    size = reader.get_int("intermediate_size")
    return MoEConfig(
        reader.get_int("num_local_experts", 16),
        size,
        RouterConfig(top_k, scoring="top_sigmoid"),
        gate="feed_forward.router",
        gate_up=("feed_forward.experts.gate_up_proj",),
        down="feed_forward.experts.down_proj",
        transposed=True,
        scaled_input=True,
        shared="feed_forward.shared_expert",
        shared_size=size,
    )


def read_config(reader: ConfigReader) -> DecoderConfig:
    """The norms of q and k stand behind the rope, which leaves them as they are before it."""
    heads = read_heads(reader, reader.get_int("intermediate_size_mlp"))
    attention_bias = reader.get_bool("attention_bias", False)
    turns = read_rope(reader, heads["head_dim"])
    return DecoderConfig(
        **heads,
        norm_eps=reader.get_float("rms_norm_eps", 1e-5),
        layers=_read_layers(reader),
        ropes=(turns, replace(turns, rule="none")),
        tie_embeddings=reader.get_bool("tie_word_embeddings", False),
        attention_scale=heads["head_dim"] ** -0.5,
        activation=read_activation(reader),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        interleaved_rope=True,
        mlp_name="feed_forward",
        moe=_read_experts(reader),
    )
