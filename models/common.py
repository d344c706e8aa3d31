"""Config reads that most architectures share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from squall.models.config import (
    Activation,
    ConfigReader,
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    RopeConfig,
)

_GELU: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_GATED: dict[str, Activation] = {"silu": "silu", "swish": "silu", **_GELU}
_PLAIN: dict[str, Activation] = {"relu2": "relu2", "xielu": "xielu", **_GELU}


def read_activation(
    reader: ConfigReader, key: str = "hidden_act", default: str = "silu", gated: bool = True
) -> Activation:
    """The activation of an MLP with gate or without."""
    names = _GATED if gated else _PLAIN
    name = reader.get_str(key, default)
    if name not in names:
        raise reader.fail(key, f"{name!r} is not known; accepted: {', '.join(names)}")
    return names[name]


def read_heads(reader: ConfigReader, intermediate_size: int | None = None) -> dict[str, Any]:
    """Sizes every GQA decoder has: the ``num_*``, ``head_dim`` and ``*_size`` fields;
    ``intermediate_size`` where it is read in another way."""
    hidden = reader.get_int("hidden_size")
    heads = reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    head_dim = reader.get_int("head_dim", 0) or hidden // heads
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    return {
        "vocab_size": reader.get_int("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": intermediate_size or reader.get_int("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": reader.get_int("max_position_embeddings"),
    }


def read_rope(reader: ConfigReader, head_dim: int, layer_type: str | None = None) -> RopeConfig:
    """The rotary settings of one layer type."""
    settings = dict(reader.rope(layer_type))
    rule = settings.pop("rope_type")
    theta = float(settings.pop("rope_theta"))
    dim = int(head_dim * float(settings.pop("partial_rotary_factor", 1.0)))
    settings.setdefault("max_position_embeddings", reader.get_int("max_position_embeddings"))
    return RopeConfig(dim, theta, rule, settings)


def read_no_ropes(reader: ConfigReader, layers: int) -> list[int]:
    """Each layer's rope where some do not turn: 0 turns, 1 does not. ``no_rope_layers`` has 1 for
    those that do; without it (or empty) each ``no_rope_layer_interval``-th does not."""
    flags = reader.get_list("no_rope_layers", None)
    if not flags:
        interval = reader.get_int("no_rope_layer_interval", 4)
        flags = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(flags) != layers:
        raise reader.fail("no_rope_layers", f"{len(flags)} entries for {layers} layers")
    return [0 if flag else 1 for flag in flags]


def read_windows(reader: ConfigReader, layers: int, default_sliding: bool) -> tuple[int, ...]:
    """Each layer's window: ``layer_types`` when given, else ``sliding_window`` on every layer
    (if ``default_sliding``) or on none."""
    window = reader.get_int("sliding_window", 0) or 0
    kinds: Any = reader.get_list("layer_types", None)
    if kinds is None:
        return (window if default_sliding else 0,) * layers
    if len(kinds) != layers:
        raise reader.fail("layer_types", f"{len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            accepted = "full_attention, sliding_attention"
            raise reader.fail("layer_types", f"{kind!r} is not known; accepted: {accepted}")
    if "sliding_attention" in kinds and window <= 0:
        raise reader.fail("sliding_window", "is needed by the sliding_attention layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_alternating_layers(reader: ConfigReader, full_every: int) -> tuple[LayerConfig, ...]:
    """Layers with a window and rope 1, each ``full_every``-th without and with rope 0; or as
    ``layer_types`` says."""
    count = reader.get_int("num_hidden_layers")
    if reader.has("layer_types"):
        windows = read_windows(reader, count, default_sliding=False)
    else:
        window = reader.get_int("sliding_window", 4096)
        windows = tuple(window if (i + 1) % full_every else 0 for i in range(count))
    return tuple(LayerConfig(window, rope=1 if window else 0) for window in windows)


def with_experts(
    config: DecoderConfig, moe: MoEConfig, where: Callable[[int], bool] = lambda layer: True
) -> DecoderConfig:
    """``config`` with experts in the layers whose number ``where`` is true for."""
    layers = tuple(replace(layer, experts=where(i)) for i, layer in enumerate(config.layers))
    return replace(config, moe=moe, layers=layers)


def read_layers(reader: ConfigReader, default_sliding: bool) -> tuple[LayerConfig, ...]:
    """Per-layer windows with one rope for all."""
    count = reader.get_int("num_hidden_layers")
    return tuple(LayerConfig(window) for window in read_windows(reader, count, default_sliding))
