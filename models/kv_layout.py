"""``KVLayout``: which layers share block tables, and which share memory.

Layers that need different numbers of past tokens cannot share a block table: what slides out of a
window is given back while full attention keeps it. So layers are put into groups that keep the same
tokens, and all groups have equally many layers, so that one block of the cache, which is a block of
keys and values in every layer of a group, can serve any group. All groups draw from one pool;
nothing is divided up beforehand. Groups that cannot be filled waste a part of their blocks.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from squall.kernels.attention.window import sees_all
from squall.models.config import DecoderConfig

# Each group has a block table of its own, which a step has to prepare and upload.
MAX_GROUPS = 8


@dataclass(frozen=True)
class KVLayout:
    """``windows`` of the groups: what a query of their layers sees (``squall.kernels.attention.
    window``).
    ``groups`` and ``places`` say of every layer with keys of its own (those of
    ``DecoderConfig.caches``) which group it is in, and which one of it."""

    windows: tuple[int, ...]
    groups: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def group_layers(self) -> int:
        """Layers that a group has room for."""
        return max(self.places) + 1

    def block_bytes(self, config: DecoderConfig, itemsize: int, block_size: int) -> int:
        """Bytes of one block: ``block_size`` tokens in all layers of one group."""
        token = config.kv_bytes_per_token(itemsize) // config.num_caches
        return token * self.group_layers * block_size


def kv_layout(config: DecoderConfig, max_len: int) -> KVLayout:
    """The layout for sequences of up to ``max_len`` tokens: windows and chunks as long as that
    are none."""
    windows_of = (layer.window for layer in config.layers if layer.shares is None)
    kept = [0 if sees_all(max_len, window) else window for window in windows_of]
    size = _group_size(Counter(kept).values())
    windows: list[int] = []
    groups, places = [0] * len(kept), [0] * len(kept)
    for window in sorted(set(kept)):
        layers = [i for i, own in enumerate(kept) if own == window]
        for n, layer in enumerate(layers):
            groups[layer], places[layer] = len(windows) + n // size, n % size
        windows += [window] * -(-len(layers) // size)
    return KVLayout(tuple(windows), tuple(groups), tuple(places))


def _group_size(counts: Iterable[int]) -> int:
    """Layers a group: the number that wastes least in the kind of layers where it wastes most, with
    at most ``MAX_GROUPS`` groups; the largest of several. ``counts`` are the layers of each kind.
    """
    counts = tuple(counts)
    limit = max(MAX_GROUPS, len(counts))
    sizes = range(max(counts), 0, -1)
    allowed = (size for size in sizes if sum(-(-n // size) for n in counts) <= limit)
    return min(allowed, key=lambda size: max(-(-n // size) * size / n for n in counts))
