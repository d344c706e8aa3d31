"""Granite MoE: Granite with experts, and in some of its models an MLP that all tokens share."""

from squall.models import granite
from squall.models.common import with_experts
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = granite.read_config(reader)
    shared = reader.get_int("shared_intermediate_size", 0)
    moe = MoEConfig(
        reader.get_int("num_local_experts"),
        config.intermediate_size,
        RouterConfig(reader.get_int("num_experts_per_tok"), scoring="top_softmax"),
        gate="block_sparse_moe.router.layer",
        gate_up=("block_sparse_moe.input_linear.weight",),
        down="block_sparse_moe.output_linear.weight",
        shared="shared_mlp" if shared else None,
        shared_size=shared,
        shared_names=(("input_linear",), "output_linear"),
    )
    return with_experts(config, moe)
