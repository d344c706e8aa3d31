"""Random weights in the types that llama.cpp's quantisation recipes give every matrix.

A recipe ("q4_k_m") is a base type and the matrices that get another one, by the rules of
``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp`` for dense models without an
importance matrix: more bits for some layers' attn_v and ffn_down, Q6_K for the output head (and
for an embedding that is also the head), a neighbouring type of 32-weight blocks where rows are no
multiple of 256.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels.moe.experts import BlockExperts, Experts, PlaneExperts
from squall.kernels.quant.base import QuantFormat, gguf_formats
from squall.kernels.quant.plane_weight import PlaneWeight
from squall.kernels.quant.planes import random_planes
from squall.kernels.weight import BlockWeight, Weight
from squall.models.config import DecoderConfig, MoEConfig
from squall.models.weights import RandomWeights

STD = 0.02  # of the weights, about that of real models


class Place(NamedTuple):
    """Where a layer's matrix stands in its model."""

    layer: int
    layers: int
    group: int  # query heads per key/value head


Rule = Callable[[Place], str | None]  # another type than the recipe's base, or None


def more_bits(place: Place) -> bool:
    """The layers that get more bits: the first eighth, the last, every third of those between."""
    layer, eighth = place.layer, place.layers // 8
    return layer < eighth or layer >= 7 * place.layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """Types by name: ``base`` for all matrices but those a rule or the head claims."""

    base: str
    values: Rule = lambda place: None  # attn_v
    down: Rule = lambda place: None  # ffn_down
    out: str | None = None  # attn_output
    fused: str | None = None  # attn_qkv, where q, k and v are one tensor


def _sixes(place: Place) -> str | None:
    return "Q6_K" if more_bits(place) else None


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "q4_0": Recipe("Q4_0"),
        "q4_1": Recipe("Q4_1"),
        "q5_0": Recipe("Q5_0"),
        "q5_1": Recipe("Q5_1"),
        "q8_0": Recipe("Q8_0"),
        "q2_k": Recipe(
            "Q2_K",
            values=lambda place: "Q4_K" if place.group >= 4 else "Q3_K",
            down=lambda place: "Q3_K",
            out="Q3_K",
        ),
        "q3_k_s": Recipe("Q3_K"),
        "q3_k_m": Recipe(
            "Q3_K",
            values=lambda place: "Q5_K" if place.layer < 2 else "Q4_K",
            down=lambda place: "Q5_K" if place.layer < place.layers // 16 else "Q4_K",
            out="Q4_K",
            fused="Q4_K",
        ),
        "q3_k_l": Recipe(
            "Q3_K",
            values=lambda place: "Q5_K",
            down=lambda place: "Q5_K",
            out="Q5_K",
            fused="Q4_K",
        ),
        "q4_k_s": Recipe(
            "Q4_K",
            values=lambda place: "Q5_K" if place.layer < 4 else None,
            down=lambda place: "Q5_K" if place.layer < place.layers // 8 else None,
        ),
        "q4_k_m": Recipe("Q4_K", values=_sixes, down=_sixes, fused="Q5_K"),
        "q5_k_s": Recipe("Q5_K"),
        "q5_k_m": Recipe("Q5_K", values=_sixes, down=_sixes, fused="Q6_K"),
        "q6_k": Recipe("Q6_K"),
    }
)

_SMALL_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.[\w.{}]+\.(\w+)\.weight")


def matrix_type(recipe: str, name: str, in_features: int, config: DecoderConfig) -> str | None:
    """The GGML type of matrix ``name`` (its Hugging Face name) of a model, or None where the
    recipe leaves it in float16 because no type's blocks fit its rows.

    ``ValueError`` for an unknown recipe.
    """
    rules = _recipe(recipe)
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        group = config.num_heads // config.num_kv_heads
        place = Place(int(layer[1]), config.num_layers, group)
        special = {
            "v_proj": rules.values(place),
            "down_proj": rules.down(place),
            "o_proj": rules.out,
            "qkv_proj": rules.fused,
        }.get(layer[2])
        wanted = special or rules.base
    elif name == "lm_head.weight" or config.tie_embeddings:
        fits = in_features % _format(rules.base).block_size == 0
        wanted = "Q6_K" if fits and rules.base != "Q8_0" else "Q8_0"
    else:
        wanted = rules.base
    if in_features % _format(wanted).block_size:
        wanted = _SMALL_BLOCKS.get(wanted, wanted)
    return None if in_features % _format(wanted).block_size else wanted


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def _format(name: str) -> QuantFormat:
    return next(entry for entry in gguf_formats().values() if entry.name == name)


class QuantisedWeights(RandomWeights):
    """A ``WeightSource`` whose matrices have a recipe's types.

    On a GPU they are made there as planes, on a CPU as the blocks of a file.
    """

    def __init__(
        self,
        recipe: str,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        super().__init__(dtype, device, seed)
        _recipe(recipe)
        self._recipe = recipe
        self._config = config

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        chosen = matrix_type(self._recipe, name, in_features, self._config)
        if chosen is None:
            return super().matrix(name, out_features, in_features)
        entry, generator = _format(chosen), self._generator
        if self.device.type in ("cuda", "xpu"):
            planes = random_planes(entry, out_features, in_features, self.device, generator)
            return PlaneWeight(planes, self.dtype)
        return BlockWeight(entry, random_blocks(entry, out_features, in_features, generator))

    def experts(self, prefix: str, moe: MoEConfig, hidden: int) -> Experts:
        count, inner = moe.experts, moe.intermediate_size
        names = prefix + moe.gate_up[0], prefix + moe.down
        shapes = (2 * inner, hidden), (hidden, inner)
        chosen = [
            matrix_type(self._recipe, name, columns, self._config)
            for name, (_, columns) in zip(names, shapes, strict=True)
        ]
        if None in chosen or moe.biases is not None:
            return super().experts(prefix, moe, hidden)
        entries = [_format(name) for name in chosen if name is not None]
        generator = self._generator
        if self.device.type in ("cuda", "xpu"):
            up, down = (
                random_planes(entry, count * rows, columns, self.device, generator)
                for entry, (rows, columns) in zip(entries, shapes, strict=True)
            )
            return PlaneExperts((up,), None, down, None, count, self.dtype)
        blocks = [
            (entry, random_blocks(entry, count * rows, columns, generator).view(count, rows, -1))
            for entry, (rows, columns) in zip(entries, shapes, strict=True)
        ]
        return BlockExperts((blocks[0],), None, blocks[1], None, self.dtype)


# Byte offsets of a block's float16 fields: the scale, and what multiplies or is the minimum.
_FLOATS: Mapping[str, tuple[int, int | None]] = MappingProxyType(
    {
        "Q4_0": (0, None),
        "Q4_1": (0, 2),
        "Q5_0": (0, None),
        "Q5_1": (0, 2),
        "Q8_0": (0, None),
        "Q2_K": (80, 82),
        "Q3_K": (108, None),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208, None),
    }
)


def random_blocks(
    entry: QuantFormat, out_features: int, in_features: int, generator: torch.Generator
) -> Tensor:
    """uint8 ``[out_features, row_bytes]`` on the generator's device: random integers, and scales
    that give the weights mean 0 and standard deviation ``STD``."""
    shape = (out_features, entry.row_bytes(in_features))
    raw = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device
    )
    blocks = raw.view(-1, entry.block_bytes)
    sample = blocks[:256].clone()
    _set_scales(entry, sample, 1.0)
    _set_scales(entry, blocks, STD / float(entry.dequantize(sample).std()))
    return raw


def _set_scales(entry: QuantFormat, blocks: Tensor, scale: float) -> None:
    """Write ``scale`` into every block, and a minimum that centres its weights."""
    scale_at, minimum_at = _FLOATS[entry.name]
    blocks[:, scale_at : scale_at + 2] = _half_bytes(scale, blocks.device)
    if minimum_at is not None:
        # The K formats subtract their minimum, times an integer as large as the scale's.
        sign = 1 if entry.block_size == 256 else -1
        minimum = sign * scale * (2**entry.bits - 1) / 2
        blocks[:, minimum_at : minimum_at + 2] = _half_bytes(minimum, blocks.device)


def _half_bytes(value: float, device: torch.device) -> Tensor:
    return torch.tensor([value], dtype=torch.float16, device=device).view(torch.uint8)
