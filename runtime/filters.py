"""top-k, top-p and the draw itself.

All work on weights: float32 [R, W], softmax numerators scaled so that the largest of a row is 1.
Tokens are ordered by descending weight, equal ones by ascending id, so that what is kept does not
depend on an algorithm's taste. On an accelerator no tensor value is read by the host.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 1 << 15
BLOCK = 512  # tokens whose weights are summed together by draw()


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype of probability sums: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_prefix(
    weights: Tensor, top_k: Tensor | None, top_p: Tensor | None, vocab_size: int
) -> Tensor:
    """Which tokens top-k and top-p keep: bool [R, W].

    In descending order, tokens are kept while fewer than ``top_k`` [R, 1] are, and while those
    before them weigh less than ``top_p`` [R, 1] of all (infinite: no limit), both of the dtype
    ``accumulator`` gives. None: no such limit; at least one is given. Columns from
    ``vocab_size`` on are padding of weight 0.
    """
    mass = None
    if top_p is not None:
        mass = weights.sum(-1, keepdim=True, dtype=top_p.dtype) * top_p
    if weights.device.type == "cpu":
        return _keep_by_sorting(weights, top_k, mass, vocab_size)
    return keep_by_histogram(weights, top_k, mass)


def _keep_by_sorting(
    weights: Tensor, top_k: Tensor | None, mass: Tensor | None, vocab_size: int
) -> Tensor:
    keep = torch.empty(weights.shape, dtype=torch.bool)
    counts = [vocab_size] * len(weights) if top_k is None else top_k.int().flatten().tolist()
    masses = [float("inf")] * len(weights) if mass is None else mass.flatten().tolist()
    for row, out, count, limit in zip(weights.numpy(), keep.numpy(), counts, masses, strict=True):
        _keep_row(row, count, limit, out)
    return keep


def _keep_row(
    weights: NDArray[np.float32], top_k: int, mass: float, out: NDArray[np.bool_]
) -> None:
    """One row of ``keep_prefix`` on the CPU, sorting only tokens that may be kept."""
    considered = weights
    if mass < float("inf"):
        # All tokens that weigh less than this are together lighter than what top-p drops.
        total = float(weights.sum(dtype=np.float64))
        considered = weights[weights > max(total - mass, 0.0) / len(weights) * (1.0 - 1e-6)]
    if top_k < len(considered):
        considered = np.partition(considered, len(considered) - top_k)[-top_k:]
    if mass < float("inf"):
        ordered = np.sort(considered)[::-1]
        sums = np.cumsum(ordered, dtype=np.float64)
        kept = min(int(np.searchsorted(sums, mass)) + 1, len(ordered))
        last = ordered[kept - 1]
        ties = kept - int(np.searchsorted(-ordered, -last))
    else:
        last = considered.min()
        ties = int(np.count_nonzero(considered == last))
    np.greater_equal(weights, last, out=out)
    tied = np.flatnonzero(weights == last)
    out[tied[ties:]] = False


class _Prefix:
    """Where the kept prefix ends: a radix select by count and by weight, 15 bits a round."""

    def __init__(self, top_k: Tensor | None, mass: Tensor | None, zero: Tensor) -> None:
        self.top_k = top_k  # [R, 1]
        self.mass = mass  # [R, 1]
        self.count_before = zero  # tokens above the bin found last, [R, 1]
        self.mass_before = zero  # and their weight

    def narrow(self, bins: Tensor, weights: Tensor, members: Tensor) -> Tensor:
        """The bin [R, 1] where the prefix ends, looking at ``members`` bool [R, W] only.

        ``bins`` int64 [R, W], ascending with descending weights.
        """
        counts = masses = None
        below = torch.ones(len(bins), BINS, dtype=torch.bool, device=bins.device)
        if self.top_k is not None:
            counts = self._cumulate(bins, members.to(weights.dtype)) + self.count_before
            below &= counts < self.top_k
        if self.mass is not None:
            masses = self._cumulate(bins, weights * members) + self.mass_before
            below &= masses < self.mass
        edge = below.sum(-1, keepdim=True).clamp_(max=BINS - 1)
        if counts is not None:
            self.count_before = _before(counts, edge, self.count_before)
        if masses is not None:
            self.mass_before = _before(masses, edge, self.mass_before)
        return edge

    @staticmethod
    def _cumulate(bins: Tensor, values: Tensor) -> Tensor:
        histogram = torch.zeros(len(bins), BINS, dtype=values.dtype, device=bins.device)
        return histogram.scatter_add_(-1, bins, values).cumsum_(-1)

    def ties_kept(self, weight: Tensor) -> Tensor:
        """How many of the tokens at the edge, each of ``weight`` [R, 1], are kept."""
        kept = torch.full_like(weight, torch.inf)
        if self.top_k is not None:
            kept = torch.minimum(kept, self.top_k - self.count_before)
        if self.mass is not None:
            kept = torch.minimum(kept, torch.ceil((self.mass - self.mass_before) / weight))
        return kept


def keep_by_histogram(weights: Tensor, top_k: Tensor | None, mass: Tensor | None) -> Tensor:
    """``keep_prefix`` in a fixed number of passes; ``mass`` [R, 1] is a sum of weights."""
    sums = weights.to(accumulator(weights.device))
    bits = weights.view(torch.int32)  # of floats >= 0: in the same order; at most 0x3F800000
    prefix = _Prefix(top_k, mass, sums.new_zeros(1, 1))
    high = (BINS - 1 - (bits >> 15)).long()
    edge = prefix.narrow(high, sums, torch.ones_like(bits, dtype=torch.bool))
    low = (BINS - 1 - (bits & (BINS - 1))).long()
    low_edge = prefix.narrow(low, sums, high == edge)
    last = ((BINS - 1 - edge) << 15) + (BINS - 1 - low_edge)
    tied = bits == last
    kept = prefix.ties_kept(torch.where(tied, sums, 0.0).amax(-1, keepdim=True))
    return (bits > last) | (tied & (tied.cumsum(-1) <= kept))


def _before(cumulated: Tensor, edge: Tensor, base: Tensor) -> Tensor:
    """The running total just before bin ``edge``."""
    previous = cumulated.gather(-1, (edge - 1).clamp_(min=0))
    return torch.where(edge > 0, previous, base)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Token ids int64 [R], each drawn with probability proportional to its weight.

    ``weights`` [R, W], W a multiple of 512; ``uniform`` [R] in [0, 1). Inverts the cumulative
    distribution in id order; a weight of 0 is never drawn.
    """
    rows, width = weights.shape
    blocks = weights.view(rows, width // BLOCK, BLOCK)
    ends = blocks.sum(-1, dtype=uniform.dtype).cumsum_(-1)
    target = uniform.unsqueeze(-1) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=width // BLOCK - 1)
    start = _before(ends, block, uniform.new_zeros(1, 1))
    inside = blocks.gather(1, block.unsqueeze(-1).expand(rows, 1, BLOCK)).squeeze(1)
    cumulated = inside.cumsum(-1, dtype=uniform.dtype).add_(start)
    offset = torch.searchsorted(cumulated, target, right=True)
    # The block's parts may add up to less than its sum by rounding: stay on a real token.
    places = torch.arange(BLOCK, device=weights.device)
    last = torch.where(inside > 0, places, 0).amax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(offset, last)).squeeze(-1)
