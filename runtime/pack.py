"""Turns a ``Plan`` into the tensors of a ``Batch``."""

import numpy as np
import torch

from squall.models.batch import Batch
from squall.runtime.scheduler import Plan


def pack(plan: Plan, block_size: int, device: torch.device) -> Batch:
    """The batch of ``plan``'s chunks, in their order; logits for the chunks that sample."""
    chunks = plan.chunks
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int64, len(chunks))
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    query_start = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(lengths, out=query_start[1:])
    token_ids = np.empty(query_start[-1], np.int64)
    for chunk, begin in zip(chunks, query_start, strict=False):
        token_ids[begin : begin + chunk.length] = chunk.seq.tokens[chunk.start : chunk.end]
    tables = np.full((len(chunks), max(len(c.seq.blocks) for c in chunks)), -1, np.int64)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.seq.blocks)] = chunk.seq.blocks
    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(query_start[-1]) - query_start[owner] + starts[owner]
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    samples = np.fromiter((chunk.samples for chunk in chunks), bool, len(chunks))
    ends = starts + lengths

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype, non_blocking=True)

    return Batch(
        token_ids=tensor(token_ids, torch.int64),
        positions=tensor(positions, torch.int64),
        slots=tensor(slots, torch.int64),
        query_start=tensor(query_start, torch.int32),
        context_lens=tensor(ends, torch.int32),
        block_tables=tensor(tables, torch.int32),
        logit_rows=tensor(query_start[1:][samples] - 1, torch.int64),
        max_query_len=int(lengths.max()),
        max_context_len=int(ends.max()),
    )
