"""``window``: which keys a query sees, of those up to its own position. One number says it to every
attention operator, to a layer (``LayerConfig``) and to the layout of the cache:

    0       all of them
    w > 0   the last w, its own included (sliding window)
    -c < 0  those of its chunk, from the last multiple of c on (chunked attention: Llama 4)

A key that one query no longer sees is seen by none that comes later. Kernels have this rule as
``first_seen`` in ``tile.py`` and ``first_key`` in ``native/cpu_attention.h``.
"""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Position = TypeVar("Position", int, "Tensor")


def first_key(position: Position, window: int) -> Position:
    """The first key that the query at ``position`` (an integer, or a tensor of them) sees; less
    than zero where a sliding window reaches beyond the beginning."""
    if window < 0:
        return position - position % -window
    return position - window + 1 if window else position * 0


def sees_all(length: int, window: int) -> bool:
    """Whether every query of a sequence of ``length`` tokens sees all keys up to its own."""
    return not 0 < abs(window) < length
