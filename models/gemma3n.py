"""Gemma 3n text: Gemma 3 with several residual streams (``squall.models.altup``), norms of v, and
last layers that read the keys and values of earlier ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from squall.models import gemma3
from squall.models.common import read_alternating_layers
from squall.models.config import AltUpConfig, ConfigReader, DecoderConfig, LayerConfig


def _read_layers(reader: ConfigReader) -> tuple[LayerConfig, ...]:
    """The last ``num_kv_shared_layers`` read the keys of the last layer of their kind before."""
    layers = read_alternating_layers(reader, full_every=5)
    shared = reader.get_int("num_kv_shared_layers", 15)
    first = len(layers) - shared
    if not 0 <= shared <= len(layers):
        raise reader.fail("num_kv_shared_layers", f"{shared} of {len(layers)} layers")
    last = {layer.rope: i for i, layer in enumerate(layers[:first])}
    if any(layer.rope not in last for layer in layers[first:]):
        raise reader.fail("num_kv_shared_layers", "a kind of layer has only shared ones")
    sharing = (replace(layer, shares=last[layer.rope]) for layer in layers[first:])
    return layers[:first] + tuple(sharing)


def _read_sparsity(reader: ConfigReader, layers: int) -> tuple[float, ...]:
    key = "activation_sparsity_pattern"
    default = [0.95] * 10 + [0.0] * (layers - 10) if layers > 10 else [0.0] * layers
    values: Sequence[Any] = reader.get_list(key, default)
    if len(values) != layers:
        raise reader.fail(key, f"{len(values)} entries for {layers} layers")
    for value in values:
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise reader.fail(key, f"{value!r} is not a share below 1")
    return tuple(map(float, values))


def read_config(reader: ConfigReader) -> DecoderConfig:
    layers = _read_layers(reader)
    sizes = reader.get_each("intermediate_size", len(layers))
    altup = AltUpConfig(
        streams=reader.get_int("altup_num_inputs", 4),
        active=reader.get_int("altup_active_idx", 0),
        scaled=reader.get_bool("altup_correct_scale", True),
        laurel_rank=reader.get_int("laurel_rank", 64),
        input_size=reader.get_int("hidden_size_per_layer_input", 256),
        input_vocab=reader.get_int("vocab_size_per_layer_input", 262144),
        intermediate_sizes=tuple(sizes),
        sparsity=_read_sparsity(reader, len(layers)),
    )
    if not 0 <= altup.active < altup.streams:
        raise reader.fail("altup_active_idx", f"{altup.active} of {altup.streams} streams")
    return replace(
        gemma3.read_config(reader, intermediate_size=max(sizes)),
        layers=layers,
        attention_scale=1.0,
        v_norm=True,
        norm_offset=0.0,
        logit_softcap=reader.get_float("final_logit_softcapping", 30.0),
        altup=altup,
    )
