"""Squall: an LLM inference engine and OpenAI-compatible server.

The public Python API::

    from squall import LLM, SamplingParams

    llm = LLM("path/or/hub-id")
    print(llm.generate("Hello", SamplingParams(max_tokens=16))[0].text)
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules:
    # GCC's OpenMP threads spin for milliseconds before they sleep. On a busy machine they spin
    # against the very work they wait for: a decode step took ten times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from squall.llm import LLM
    from squall.runtime.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that ``squall --help`` needs no torch."""
    if name == "LLM":
        from squall.llm import LLM

        return LLM
    if name == "SamplingParams":
        from squall.runtime.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'squall' has no attribute {name!r}")
