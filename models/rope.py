"""Rotary tables: inverse frequencies by scaling rule, then cos and sin for every position.

Rules and formulas are those of transformers' ``modeling_rope_utils`` (default, linear, llama3,
yarn) and of GGUF's ``rope_freqs.weight`` (``factors``).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squall.models.config import RopeConfig

# A rule maps (plain inverse frequencies f64 [dim / 2], config) to (frequencies, factor on cos/sin).
Rule = Callable[[Tensor, RopeConfig], tuple[Tensor, float]]


def rope_table(config: RopeConfig, length: int, device: torch.device) -> Tensor:
    """``[length, dim]`` float32: cos in the first half of a row, sin in the second."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim
    inverse, factor = RULES[config.rule](config.theta**-exponents, config)
    # transformers rounds the inverse frequencies to float32, which shows in long contexts
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse.float())
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).to(device)


def check_rope(config: RopeConfig) -> str | None:
    """Why ``config`` cannot be used, or None."""
    if config.rule not in RULES:
        return f"rope_type {config.rule!r} is not supported; supported: {', '.join(RULES)}"
    missing = [key for key in _REQUIRED.get(config.rule, ()) if config.settings.get(key) is None]
    return f"rope_type {config.rule!r} needs {', '.join(missing)}" if missing else None


def _number(config: RopeConfig, key: str, default: float | None = None) -> float:
    value: Any = config.settings.get(key)
    return float(default if value is None and default is not None else value)


def _default(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    return inverse, 1.0


def _linear(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    return inverse / _number(config, "factor"), 1.0


def _llama3(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    factor = _number(config, "factor")
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    turns = _number(config, "original_max_position_embeddings") * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by factor, 1: as it was
    return (1 - kept) * inverse / factor + kept * inverse, 1.0


def _yarn(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    factor = _number(config, "factor")
    original = _number(
        config,
        "original_max_position_embeddings",
        _number(config, "max_position_embeddings"),
    )

    def dim_of(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return config.dim * math.log(turns) / (2 * math.log(config.theta))

    low = dim_of(_number(config, "beta_fast", 32.0))
    high = dim_of(_number(config, "beta_slow", 1.0))
    if config.settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    steps = torch.arange(config.dim // 2, dtype=torch.float64)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)  # 1: interpolated
    return ramp * inverse / factor + (1 - ramp) * inverse, _yarn_attention_factor(config, factor)


def _yarn_attention_factor(config: RopeConfig, factor: float) -> float:
    given = config.settings.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = config.settings.get("mscale"), config.settings.get("mscale_all_dim")
    if mscale and all_dim:
        return magnitude(float(mscale)) / magnitude(float(all_dim))
    return magnitude(1.0)


def _factors(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    return inverse / torch.as_tensor(config.settings["factors"], dtype=torch.float64), 1.0


RULES: dict[str, Rule] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "factors": ("factors",),
}
