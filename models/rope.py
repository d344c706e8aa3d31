"""Rotary tables: inverse frequencies by scaling rule, then cos and sin for every position.

Rules and formulas are those of transformers' ``modeling_rope_utils`` (default, linear, llama3,
yarn, longrope, dynamic) and of GGUF's ``rope_freqs.weight`` (``factors``).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squall.models.config import RopeConfig

# A rule maps (plain inverse frequencies f64 [dim / 2], config, longest sequence) to (frequencies,
# factor on cos and sin).
Rule = Callable[[Tensor, RopeConfig, int], tuple[Tensor, float]]


def rope_table(config: RopeConfig, length: int, device: torch.device) -> Tensor:
    """``[length, dim]`` float32: cos in the first half of a row, sin in the second."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim
    inverse, factor = RULES[config.rule](config.theta**-exponents, config, length)
    # transformers rounds the inverse frequencies to float32, which shows in long contexts
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse.float())
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).to(device)


def halves_first(
    heads: int, head_dim: int, rotary: int, device: torch.device, start: int = 0
) -> Tensor:
    """Rows of a q or k projection in another order, int64 ``[heads * head_dim]``: of ``rotary``
    elements of each head, from ``start`` on, the even ones, then the odd ones.

    Some models rotate elements 2i and 2i + 1 together; ours rotate i and i + rotary / 2. Scores are
    the same when q and k are both reordered.
    """
    row = torch.arange(head_dim, device=device)
    rotated = slice(start, start + rotary)
    row[rotated] = row[rotated].view(-1, 2).t().flatten()
    return (torch.arange(heads, device=device)[:, None] * head_dim + row).flatten()


def check_rope(config: RopeConfig) -> str | None:
    """Why ``config`` cannot be used, or None."""
    if config.rule not in RULES:
        return f"rope_type {config.rule!r} is not supported; supported: {', '.join(RULES)}"
    missing = [key for key in _REQUIRED.get(config.rule, ()) if config.settings.get(key) is None]
    if missing:
        return f"rope_type {config.rule!r} needs {', '.join(missing)}"
    for key in _LISTS.get(config.rule, ()):
        factors, count = config.settings[key], config.dim // 2
        if not isinstance(factors, list) or len(factors) != count:
            return f"rope_type {config.rule!r}: {key} must be a list of {count} numbers"
        if not all(isinstance(f, (int, float)) and 0 < f < math.inf for f in factors):
            return f"rope_type {config.rule!r}: {key} has values that are not numbers above 0"
    return None


def _number(config: RopeConfig, key: str, default: float | None = None) -> float:
    value: Any = config.settings.get(key)
    return float(default if value is None and default is not None else value)


def _none(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """No rotation at any position (layers without positions among others that have them)."""
    return torch.zeros_like(inverse), 1.0


def _default(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    return inverse, 1.0


def _linear(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    return inverse / _number(config, "factor"), 1.0


def _llama3(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    factor = _number(config, "factor")
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    turns = _number(config, "original_max_position_embeddings") * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by factor, 1: as it was
    return (1 - kept) * inverse / factor + kept * inverse, 1.0


def _yarn(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
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

    mscale, all_dim = config.settings.get("mscale"), config.settings.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_magnitude(factor, float(mscale)) / yarn_magnitude(factor, float(all_dim))
    return yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, weight: float) -> float:
    """YaRN's correction of the scores of a context ``factor`` times as long (Peng et al. 2023,
    arXiv:2309.00071, equation 22), its logarithm weighted."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """One set of divisors for sequences within the original context, another for longer ones.

    transformers changes over in the middle of a sequence, which leaves its cache with keys of both;
    here the longest sequence that is possible decides for all.
    """
    original = _number(config, "original_max_position_embeddings")
    kind = "long" if length > original else "short"
    factors = config.settings[f"{kind}_factor"]
    given = config.settings.get("factor")
    stretch = float(given or _number(config, "max_position_embeddings") / original)
    attention = config.settings.get(f"{kind}_mscale", config.settings.get("attention_factor"))
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return inverse / torch.tensor(factors, dtype=torch.float64), float(attention)


def _dynamic(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """The base grows with the sequence once that is longer than the trained context.

    transformers follows the length of the sequence so far, which leaves its cache with keys of many
    bases; here the longest sequence that is possible decides for all, as with ``_longrope``. So a
    sequence of that length gets transformers' angles in every position, and up to the trained
    context nothing is stretched.
    """
    trained, factor = _number(config, "max_position_embeddings"), _number(config, "factor")
    growth = factor * max(length, trained) / trained - (factor - 1)
    # base^(-2i/dim) of base * growth^(dim / (dim - 2))
    exponents = torch.arange(config.dim // 2, dtype=torch.float64) / (config.dim / 2 - 1)
    return inverse * growth**-exponents, 1.0


def _factors(inverse: Tensor, config: RopeConfig, length: int) -> tuple[Tensor, float]:
    return inverse / torch.as_tensor(config.settings["factors"], dtype=torch.float64), 1.0


RULES: dict[str, Rule] = {
    "default": _default,
    "none": _none,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "dynamic": _dynamic,
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
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}
_LISTS: dict[str, tuple[str, ...]] = {"longrope": ("short_factor", "long_factor")}
