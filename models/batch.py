"""``Batch``: all that one forward pass needs to know about its tokens."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from squall.models.config import KVShape


@dataclass(frozen=True)
class Batch:
    """One step's tokens, packed over sequences without padding.

    T tokens of S sequences; a sequence contributes one token (decode) or a chunk of its prompt.
    Index tensors live on the model's device. The decode steps of a captured graph have lengths
    that vary from replay to replay: ``max_context_len`` is then the longest there may be.
    """

    token_ids: Tensor  # int [T]; int is int32 or int64
    positions: Tensor  # int [T], place of every token in its own sequence
    slots: Tensor  # int [T], block * block_size + offset in the KV cache; negative: do not store
    query_start: Tensor  # int32 [S + 1], first token of every sequence, then T
    context_lens: Tensor  # int32 [S], cached tokens after this step (its own tokens included)
    block_tables: Tensor  # int32 [S, B], cache blocks of every sequence; unused entries are -1
    logit_rows: Tensor | None  # int [L], the tokens whose logits are wanted; None: all
    max_query_len: int
    max_context_len: int
    query_lens: tuple[int, ...] = ()  # of every sequence; empty where they vary from run to run
    contexts: tuple[int, ...] = ()  # context_lens, likewise
    further: tuple[tuple[Tensor, Tensor], ...] = ()  # slots and tables of groups of layers after 0

    def views(self) -> tuple["Batch", ...]:
        """The batch as each group of layers sees it, with slots and block tables of its own."""
        others = (replace(self, slots=s, block_tables=t, further=()) for s, t in self.further)
        return self, *others


@dataclass(frozen=True)
class KVCache:
    """Paged key/value memory: one pair of tensors per layer, and which of the batch's views the
    layer reads and writes it with (``groups``).

    Keys are ``[blocks, block_size, heads, key_dim]``, values ``[..., value_dim]``, which may be 0.
    Layers of different groups may share a pair: their blocks are different ones.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_size: int
    groups: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in set(self.keys + self.values))

    def shared(self, groups: tuple[int, ...], places: tuple[int, ...]) -> "KVCache":
        """The cache of as many layers as ``places`` has entries: each is in its group and has the
        pair of tensors that its place says."""
        keys = tuple(self.keys[place] for place in places)
        values = tuple(self.values[place] for place in places)
        return KVCache(keys, values, self.block_size, groups)

    @staticmethod
    def allocate(
        layers: int,
        blocks: int,
        block_size: int,
        shape: KVShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Zero-filled caches of ``blocks`` blocks; all layers are in group 0 and share nothing.

        On a CPU the memory is only taken as blocks are used.
        """

        def zeros(dim: int) -> Tensor:
            size = (blocks, block_size, shape.heads, dim)
            if device.type != "cpu" or dim == 0:
                return torch.zeros(size, dtype=dtype, device=device)
            # numpy gets untouched pages from the system, torch writes zeros into all of them
            nbytes = math.prod(size) * dtype.itemsize
            return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(size)

        keys = tuple(zeros(shape.key_dim) for _ in range(layers))
        values = tuple(zeros(shape.value_dim) for _ in range(layers))
        return KVCache(keys, values, block_size, (0,) * layers)
