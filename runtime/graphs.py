"""CUDA graphs of the decode step, one per batch size.

A graph holds the whole step: the ids the last step sampled, embedding, layers, head, sampler, the
new ids. All graphs share one memory pool. Small sizes are captured at start, largest first; others
when a batch first needs them or while the engine is idle, so that serving starts early.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from squall.loaders.progress import Progress

log = logging.getLogger(__name__)

Step = Callable[[int], Tensor]  # batch size -> logits; writes the sampled ids into their buffer

_CAPTURING = threading.Lock()  # torch can capture one graph at a time in a process

AT_START = 8  # sizes up to this are captured before the first request


def graph_sizes(max_seqs: int) -> tuple[int, ...]:
    """Batch sizes worth a graph of their own, ascending; the last one is ``max_seqs``.

    Of 8 rows and more, at most a quarter are padding, or 7 rows.
    """
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, max_seqs, 32), max_seqs}
    return tuple(sorted(size for size in sizes if size <= max_seqs))


class _Memory:
    """Device memory as ``torch.as_tensor`` sees it: it owns nothing."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


class DecodeGraphs:
    """The decode step of one engine, captured size by size."""

    def __init__(self, step: Step, sizes: tuple[int, ...], device: torch.device) -> None:
        self._step = step
        self._sizes = sizes
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}

    def size_for(self, count: int) -> int | None:
        """The size that serves ``count`` rows; None for more than the largest."""
        return next((size for size in self._sizes if size >= count), None)

    def run(self, size: int) -> Tensor:
        """Run the step of ``size`` rows; its logits [size, vocab], valid until the next run.

        The first time, it runs as it is and is captured afterwards. A size whose capture fails
        (memory for it is not reserved) is not tried again.
        """
        if size in self._graphs:
            self._graphs[size].replay()
            return self._logits[size]
        logits = self._step(size)  # compiles and loads the kernels, which a capture must not
        try:
            with _CAPTURING:
                self._capture(size)
        except Exception as error:
            log.warning("decode steps of %d rows run without a CUDA graph: %s", size, error)
            self._sizes = tuple(other for other in self._sizes if other != size)
        return logits

    def missing(self, limit: int | None = None) -> tuple[int, ...]:
        """Sizes (up to ``limit``) that are not captured yet, largest first."""
        sizes = (size for size in reversed(self._sizes) if limit is None or size <= limit)
        return tuple(size for size in sizes if size not in self._graphs)

    def capture(self, progress: Progress, limit: int | None = None) -> None:
        """Capture the missing sizes, up to ``limit``, while nothing else runs."""
        sizes = self.missing(limit)
        with progress.phase("capture", len(sizes), "it") as advance:
            for size in sizes:
                self.run(size)
                advance(1)

    def _capture(self, size: int) -> None:
        torch.cuda.synchronize(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        how: Any = {"pool": self._pool, "stream": self._stream}
        with (
            _no_collection(),
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, capture_error_mode="thread_local", **how),
        ):
            logits = self._step(size)
        self._pool = graph.pool()
        self._graphs[size] = graph
        # Owning the logits would keep their part of the pool from the other graphs.
        self._logits[size] = torch.as_tensor(_Memory(logits), device=self._device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running; it slows a capture down several times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
