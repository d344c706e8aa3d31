"""ERNIE 4.5 with experts: chosen by corrected scores, behind some dense layers."""

from squall.models import ernie4_5
from squall.models.common import with_experts
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = ernie4_5.read_config(reader)
    experts, size = reader.get_int("moe_num_experts"), reader.get_int("moe_intermediate_size")
    shared = (reader.get_int("moe_num_shared_experts", 0) or 0) * size
    moe = MoEConfig(
        experts,
        size,
        RouterConfig(reader.get_int("moe_k"), renormalize=True),
        correction="mlp.moe_statics.e_score_correction_bias",
        correction_shape=(1, experts),
        shared="mlp.shared_experts" if shared else None,
        shared_size=shared,
    )
    first, last = reader.get_int("moe_layer_start_index", 1), config.num_layers - 1
    end, step = reader.get_int("moe_layer_end_index", -1), reader.get_int("moe_layer_interval", 1)
    last = last if end == -1 else end
    return with_experts(
        config, moe, lambda layer: first <= layer <= last and (layer + 1) % step == 0
    )
