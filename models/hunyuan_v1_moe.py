"""HunYuan with experts (A13B): the dense model's block, a shared MLP beside the experts."""

from squall.models import hunyuan_v1_dense
from squall.models.common import with_experts
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def _one(reader: ConfigReader, key: str) -> int:
    """A count that may be given for every layer."""
    if not reader.is_list(key):
        return int(reader.get_int(key))
    values = reader.get_list(key)
    if len(set(values)) != 1:
        raise reader.fail(key, "differs from layer to layer; accepted: one number for all")
    return int(values[0])


def read_config(reader: ConfigReader) -> DecoderConfig:
    config = hunyuan_v1_dense.read_config(reader)
    moe = MoEConfig(
        _one(reader, "num_experts"),
        config.intermediate_size,
        RouterConfig(_one(reader, "moe_topk"), renormalize=True),
        gate="mlp.gate.wg",
        shared="mlp.shared_mlp",
        shared_size=config.intermediate_size,
    )
    return with_experts(config, moe)
