"""The experts of DeepSeek's models, and of those that took them over."""

from squall.models import common
from squall.models.config import ConfigReader, DecoderConfig, MoEConfig, RouterConfig


def with_experts(
    config: DecoderConfig, reader: ConfigReader, router: RouterConfig
) -> DecoderConfig:
    """``config`` with experts behind the first dense layers; all tokens share ``n_shared_experts``
    more, which are one MLP."""
    size = reader.get_int("moe_intermediate_size")
    shared = (reader.get_int("n_shared_experts", 0) or 0) * size
    corrected = router.scoring == "sigmoid"
    moe = MoEConfig(
        reader.get_int("n_routed_experts"),
        size,
        router,
        correction="mlp.gate.e_score_correction_bias" if corrected else None,
        shared="mlp.shared_experts" if shared else None,
        shared_size=shared,
    )
    if moe.experts % router.groups:
        raise reader.fail("n_group", f"{router.groups} does not divide {moe.experts} experts")
    dense = reader.get_int("first_k_dense_replace", 0)
    return common.with_experts(config, moe, lambda layer: layer >= dense)


def read_v3_router(reader: ConfigReader) -> RouterConfig:
    """The router of DeepSeek V3: sigmoid scores; a group is as good as its two best experts."""
    return RouterConfig(
        top_k=reader.get_int("num_experts_per_tok"),
        scoring="sigmoid",
        renormalize=reader.get_bool("norm_topk_prob", True),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        groups=reader.get_int("n_group", 1) or 1,
        top_groups=reader.get_int("topk_group", 1) or 1,
        group_best=2,
    )
