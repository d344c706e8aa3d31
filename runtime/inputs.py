"""What a step reads that changes from step to step: one upload into buffers of a fixed address.

A decode step is captured once per batch size and replayed, so its inputs lie in static buffers. The
host fills one of two pinned copies (the other may still be on its way) and uploads it whole; block
tables, which hardly change, are kept on the device and only their new entries are sent. Those that
slid out of a window stay as they were: nobody reads them.
"""

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from squall.runtime.pack import source_of
from squall.runtime.request import Sequence
from squall.runtime.sample_plan import SampleRow
from squall.runtime.scheduler import Chunk

# Fields of one row. The widest come first, so that each field is aligned.
_FIELDS: tuple[tuple[str, torch.dtype], ...] = (
    ("key", torch.int64),  # the sampler's seed
    ("source", torch.int32),  # a row of the last step's sampled ids, or -1 - token id
    ("positions", torch.int32),
    ("slots", torch.int32),  # one a group of layers
    ("context_lens", torch.int32),
    ("output_position", torch.int32),
    ("top_k", torch.int32),
    ("temperature", torch.float32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
)
_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}
# A row that pads the batch: no context, nothing stored, nothing drawn.
_IDLE = {"source": -1, "slots": -1, "top_p": 1.0}


class _Fields:
    """One buffer of all fields, and a view of each by name: [rows], of slots [groups, rows]."""

    def __init__(self, rows: int, groups: int, device: torch.device, pinned: bool = False) -> None:
        shapes = {name: (groups, rows) if name == "slots" else (rows,) for name, _ in _FIELDS}
        sizes = [math.prod(shapes[name]) * dtype.itemsize for name, dtype in _FIELDS]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        self.views: dict[str, Tensor] = {}
        for (name, dtype), part in zip(_FIELDS, torch.split(self.buffer, sizes), strict=True):
            self.views[name] = part.view(dtype).view(shapes[name])


class DecodeInputs:
    """Static inputs of up to ``rows`` sequences that decode one token each; they have a block table
    of ``max_blocks`` entries for each of the ``groups`` of layers."""

    def __init__(
        self, rows: int, groups: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.rows = rows
        self.block_size = block_size
        pinned = device.type == "cuda"
        self.fields = _Fields(rows, groups, device)
        self.clear()
        self._staging = [_Fields(rows, groups, torch.device("cpu"), pinned) for _ in range(2)]
        self._turn = 0
        self.query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        shape = groups, rows, max_blocks
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        # what each row's tables hold: (arrival, preemptions) of a sequence, and its first blocks
        self._held: list[tuple[tuple[int, int], int]] = [((-1, 0), 0)] * rows
        self._pinned = pinned

    def clear(self) -> None:
        """Make every row one that pads the batch."""
        self.fields.buffer.zero_()
        for name, value in _IDLE.items():
            self.fields.views[name].fill_(value)

    def arrange(self, sequences: Rows[Sequence]) -> list[int]:
        """An order of ``sequences`` in which those that have a row keep it, so that when one leaves
        only the last ones move: rows that move have their whole block table sent."""
        count = len(sequences)
        rows = {owner: row for row, (owner, _) in enumerate(self._held[:count])}
        order, late = [-1] * count, []
        for i, seq in enumerate(sequences):
            row = rows.get((seq.arrival, seq.preemptions))
            if row is None:
                late.append(i)
            else:
                order[row] = i
        for row in range(count):
            if order[row] < 0:
                order[row] = late.pop()
        return order

    def fill(self, chunks: Rows[Chunk], rows: Rows[SampleRow], size: int) -> None:
        """Upload one decode step of ``chunks``, padded to ``size`` rows."""
        host = self._next_staging()
        count = len(chunks)
        for name, view in host.items():
            view[..., count:size] = _IDLE.get(name, 0)
        starts = np.fromiter((c.start for c in chunks), np.int32, count)
        host["positions"][:count] = starts
        host["context_lens"][:count] = starts + 1
        entries = [(c.seq.blocks, c.start // self.block_size) for c in chunks]
        for group, slots in enumerate(host["slots"]):
            own = np.fromiter((tables[group][i] for tables, i in entries), np.int32, count)
            slots[:count] = own * self.block_size + starts % self.block_size
        host["source"][:count] = [source_of(c.seq, c.start) for c in chunks]
        sequences = [c.seq for c in chunks]
        _write_sampling(host, sequences, rows)
        self._send_tables(sequences)
        self._send()

    def fill_sampling(self, sequences: Rows[Sequence], rows: Rows[SampleRow]) -> None:
        """Upload only what the sampling kernel reads, for a step that is no pure decode."""
        _write_sampling(self._next_staging(), sequences, rows)
        self._send()

    def sampling(self, count: int) -> tuple[Tensor, ...]:
        """What ``sample_tokens`` takes after the logits, of the first ``count`` rows."""
        names = ("temperature", "top_k", "top_p", "min_p", "key", "output_position")
        return tuple(self.fields.views[name][:count] for name in names)

    def _next_staging(self) -> dict[str, np.ndarray]:
        self._turn ^= 1
        return {name: view.numpy() for name, view in self._staging[self._turn].views.items()}

    def _send(self) -> None:
        self.fields.buffer.copy_(self._staging[self._turn].buffer, non_blocking=True)

    def _send_tables(self, sequences: Rows[Sequence]) -> None:
        """Bring the device's block tables up to date with what each row's sequence holds."""
        places: list[int] = []
        values: list[int] = []
        _, rows, width = self.block_tables.shape
        for row, seq in enumerate(sequences):
            owner, known = self._held[row]
            now, count = (seq.arrival, seq.preemptions), len(seq.blocks[0])
            if owner != now:
                known = 0
            if known < count:
                for group, table in enumerate(seq.blocks):
                    begin = (group * rows + row) * width
                    places += range(begin + known, begin + count)
                    values += table[known:]
            self._held[row] = now, count
        if places:
            host = torch.tensor([places, values], dtype=torch.int64)
            if self._pinned:
                host = host.pin_memory()
            sent = host.to(self.block_tables.device, non_blocking=True)
            self.block_tables.view(-1).index_copy_(0, sent[0], sent[1].int())


def _write_sampling(
    host: dict[str, np.ndarray], sequences: Rows[Sequence], rows: Rows[SampleRow]
) -> None:
    """Write what the sampling kernel needs to know of each row."""
    count = len(rows)
    params = [row.params for row in rows]
    host["key"][:count] = np.array([row.key for row in rows], np.uint64).view(np.int64)
    # the token being sampled is already counted as in flight
    host["output_position"][:count] = [seq.sampled - 1 for seq in sequences]
    host["temperature"][:count] = [0.0 if p.greedy else p.temperature for p in params]
    host["top_k"][:count] = [p.top_k for p in params]
    host["top_p"][:count] = [p.top_p for p in params]
    host["min_p"][:count] = [p.min_p for p in params]
