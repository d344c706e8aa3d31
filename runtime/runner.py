"""``Runner``: a plan's chunks to sampled token ids.

On a GPU a step is launched and its ids are read later (``Launched.ids``): meanwhile the host plans
and launches the next one, which takes the ids it needs from ``sampled`` on the device. A step whose
sampling needs the host (token biases, DRY, log-probabilities) and every step on another device has
its ids at once.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from squall.kernels.sample import gather_ids, sample_tokens_
from squall.loaders.progress import Progress
from squall.models.batch import Batch, KVCache
from squall.models.decoder import Decoder
from squall.runtime.graphs import AT_START, DecodeGraphs, graph_sizes
from squall.runtime.inputs import DecodeInputs
from squall.runtime.pack import pack
from squall.runtime.pages import blocks_for
from squall.runtime.sampler import SampleOutput, Sampler, SampleRow, as_output
from squall.runtime.scheduler import Chunk, Limits


@dataclass(frozen=True)
class Launched:
    """A step under way. ``chunks`` are those that sample, in the order of their rows."""

    chunks: tuple[Chunk, ...]
    rows: tuple[SampleRow, ...]
    logits: Tensor | None  # to be sampled with the host's help
    ids: Tensor | None  # pinned, valid once ``done``
    done: torch.cuda.Event | None

    @property
    def deferred(self) -> bool:
        """Whether the ids come by themselves, later."""
        return self.logits is None


class Runner:
    """Owns what a step needs beside model and cache; not thread-safe."""

    def __init__(self, model: Decoder, cache: KVCache, limits: Limits) -> None:
        self.model = model
        self.cache = cache
        self.limits = limits
        self.sampler = Sampler(model.config.vocab_size, model.device)
        self._graphs: DecodeGraphs | None = None
        self._asynchronous = model.device.type == "cuda"
        rows, size = limits.max_seqs, limits.block_size
        self._sampled = torch.zeros(rows, dtype=torch.int32, device=model.device)
        if self._asynchronous:
            blocks = blocks_for(limits.max_seq_len, size)
            self._inputs = DecodeInputs(rows, limits.groups, blocks, size, model.device)
            self._host_ids = [torch.zeros(rows, dtype=torch.int32).pin_memory() for _ in range(2)]
            self._turn = 0

    @torch.inference_mode()
    def capture(self, progress: Progress, limit: int | None = AT_START) -> None:
        """Capture decode steps of up to ``limit`` rows (CUDA, while nothing runs); those of other
        sizes are captured when they are needed or by ``capture_one``."""
        if self._graphs is None:
            sizes = graph_sizes(self.limits.max_seqs)
            self._graphs = DecodeGraphs(self._decode, sizes, self.model.device)
        self._inputs.clear()
        self._graphs.capture(progress, limit)

    @torch.inference_mode()
    def capture_one(self) -> bool:
        """Capture one more size, if any is missing; call it while nothing runs."""
        if self._graphs is None or not self._graphs.missing():
            return False
        self._inputs.clear()
        self._graphs.run(self._graphs.missing()[-1])
        return True

    @torch.inference_mode()
    def launch(self, chunks: Rows[Chunk], rows: Rows[SampleRow]) -> Launched:
        """Start one step; ``rows`` belong to the chunks that sample."""
        sampling = tuple(chunk for chunk in chunks if chunk.samples)
        on_device = self._asynchronous and all(row.on_device for row in rows)
        size = self._graph_size(chunks, sampling)
        if size is not None:
            order = self._inputs.arrange([chunk.seq for chunk in chunks])
            chunks = sampling = tuple(chunks[i] for i in order)
            rows = [rows[i] for i in order]
        if size is None:
            batch = pack(chunks, self.limits.block_size, self._sampled)
            logits = self.model(batch, self.cache)
        else:
            logits = self._replay(size, chunks, rows)
        if not rows:
            launched = Launched((), (), None, None, None)
        elif not on_device:
            launched = Launched(sampling, tuple(rows), logits, None, None)
        else:
            if size is None:
                self._inputs.fill_sampling([chunk.seq for chunk in sampling], rows)
            if size is None or any(row.counts for row in rows):
                self._sample(logits, sampling, rows)
            launched = self._read_back(sampling, tuple(rows))
        for place, chunk in enumerate(sampling):
            chunk.seq.row = place
        return launched

    @torch.inference_mode()
    def finish(self, step: Launched) -> SampleOutput:
        """The ids of a step's rows; waits for them."""
        if step.logits is not None:
            return self.sampler.sample(step.logits, step.rows)
        if step.ids is None or step.done is None:
            return as_output([])
        step.done.synchronize()
        return as_output(step.ids[: len(step.rows)].tolist())

    def release(self) -> None:
        """Give idle memory back; call it when nothing runs."""
        self.sampler.release()

    def _replay(self, size: int, chunks: Rows[Chunk], rows: Rows[SampleRow]) -> Tensor:
        assert self._graphs is not None
        self._inputs.fill(chunks, rows, size)
        return self._graphs.run(size)[: len(rows)]

    def _graph_size(self, chunks: Rows[Chunk], sampling: Rows[Chunk]) -> int | None:
        """The graph that can run this step: one for pure decodes."""
        if self._graphs is None or len(sampling) != len(chunks):
            return None
        if any(chunk.length != 1 for chunk in chunks):
            return None
        return self._graphs.size_for(len(chunks))

    def _decode(self, size: int) -> Tensor:
        """One decode step of ``size`` rows on the static inputs: what a graph captures."""
        inputs = self._inputs
        fields = {name: view[..., :size] for name, view in inputs.fields.views.items()}
        index = zip(fields["slots"], inputs.block_tables[:, :size], strict=True)
        (slots, tables), *further = index
        batch = Batch(
            token_ids=gather_ids(self._sampled, fields["source"]),
            positions=fields["positions"],
            slots=slots,
            query_start=inputs.query_start[: size + 1],
            context_lens=fields["context_lens"],
            block_tables=tables,
            logit_rows=None,
            max_query_len=1,
            max_context_len=self.limits.max_seq_len,
            further=tuple(further),
        )
        logits = self.model(batch, self.cache)
        sample_tokens_(logits, *inputs.sampling(size), self._sampled[:size])
        return logits

    def _sample(self, logits: Tensor, sampling: Rows[Chunk], rows: Rows[SampleRow]) -> None:
        """Sample into ``_sampled``, with the parameters that were uploaded, outside a graph."""
        ids = self._sampled[: len(rows)]
        counted = any(row.counts for row in rows)
        if counted:
            self.sampler.penalize(logits, rows, [chunk.seq.sampled - 1 for chunk in sampling])
        sample_tokens_(logits, *self._inputs.sampling(len(rows)), ids)
        if counted:
            self.sampler.count(rows, ids)

    def _read_back(self, sampling: tuple[Chunk, ...], rows: tuple[SampleRow, ...]) -> Launched:
        self._turn ^= 1
        host = self._host_ids[self._turn]
        count = len(rows)
        host[:count].copy_(self._sampled[:count], non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.model.device))
        return Launched(sampling, rows, None, host, done)
