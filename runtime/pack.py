"""Turns a ``Plan`` into the tensors of a ``Batch``."""

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from squall.kernels.sample import gather_ids
from squall.models.batch import Batch
from squall.runtime.request import Sequence
from squall.runtime.scheduler import Chunk


def source_of(seq: Sequence, position: int) -> int:
    """Where the token at ``position`` comes from: ``-1 - id`` if the host knows it, else the row of
    the last step's samples."""
    return -1 - seq.tokens[position] if position < len(seq.tokens) else seq.row


def pack(chunks: Rows[Chunk], block_size: int, sampled: Tensor) -> Batch:
    """The batch of ``chunks``, in their order; logits for the chunks that sample.

    ``sampled`` int32 are the ids of the last step, on the model's device; tokens the host does not
    know yet are taken from it. All index tensors are int32 and travel in one upload.
    """
    count = len(chunks)
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int64, count)
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
    query_start = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=query_start[1:])
    owner = np.repeat(np.arange(count), lengths)
    positions = np.arange(query_start[-1]) - query_start[owner] + starts[owner]
    index: list[np.ndarray] = []  # slots and block tables of each group of layers
    for group in range(len(chunks[0].seq.blocks)):
        tables = _tables([chunk.seq.blocks[group] for chunk in chunks])
        blocks = tables[owner, positions // block_size]
        index += [blocks * block_size + positions % block_size, tables]
    samples = np.fromiter((chunk.samples for chunk in chunks), bool, count)
    source, in_flight = _sources(chunks, query_start)
    ends = starts + lengths
    rows = query_start[1:][samples] - 1
    sent = _upload((source, positions, query_start, ends, rows, *index), sampled.device)
    return Batch(
        token_ids=gather_ids(sampled, sent[0]) if in_flight else sent[0],
        positions=sent[1],
        slots=sent[5],
        query_start=sent[2],
        context_lens=sent[3],
        block_tables=sent[6],
        logit_rows=sent[4],
        max_query_len=int(lengths.max()),
        max_context_len=int(ends.max()),
        query_lens=tuple(lengths.tolist()),
        contexts=tuple(ends.tolist()),
        further=tuple(zip(sent[7::2], sent[8::2], strict=True)),
    )


def _tables(blocks: Rows[list[int]]) -> np.ndarray:
    """The block tables of all sequences in one array, filled up with -1."""
    tables = np.full((len(blocks), max(map(len, blocks))), -1, np.int64)
    for row, own in zip(tables, blocks, strict=True):
        row[: len(own)] = own
    return tables


def _sources(chunks: Rows[Chunk], query_start: np.ndarray) -> tuple[np.ndarray, bool]:
    """Token ids of all chunks; where some are in flight, ``source_of`` of every token instead."""
    in_flight = any(chunk.end > len(chunk.seq.tokens) for chunk in chunks)
    source = np.empty(query_start[-1], np.int64)
    for chunk, begin in zip(chunks, query_start, strict=False):
        place = slice(begin, begin + chunk.length)
        if chunk.end > len(chunk.seq.tokens):
            source[place] = chunk.seq.row
        else:
            known = np.array(chunk.seq.tokens[chunk.start : chunk.end], np.int64)
            source[place] = -1 - known if in_flight else known
    return source, in_flight


def _upload(arrays: Rows[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as int32 tensors on ``device``."""
    if device.type == "cpu":
        return [torch.from_numpy(array.astype(np.int32)) for array in arrays]
    # a copy from memory that is not pinned would wait for all the work before it
    sizes = [array.size for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([a.ravel() for a in arrays], out=host.numpy(), casting="unsafe")
    parts = host.to(device, non_blocking=device.type == "cuda").split_with_sizes(sizes)
    return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]
