"""Sampling on the device: one token id per row of logits, each row by its own parameters.

    sample_tokens_(logits, temperature, top_k, top_p, min_p, key, position, ids)

writes them to ``ids`` int32 ``[S]``.

``logits`` float32 ``[S, V]``, V up to 262,144; rows may be strided. All parameters are dense
tensors ``[S]``, so one CUDA graph serves every mix of requests: ``temperature`` float32 (below
1e-7: greedy), ``top_k`` int32 (off: below 1 or at least V), ``top_p`` float32 (off: 1 or more),
``min_p`` float32 (off: 0), ``key`` int64 (the bits of the uint64 mixed seed), ``position`` int32
(index of the output token). A row whose best logit is NaN or infinite gets -1; NaN is the best.

The meaning is that of ``runtime/sampler.py``. Greedy: the best logit, of equal ones the lowest id.
Otherwise tokens weigh ``w = exp((logit - best) / temperature)`` and are ordered by descending
weight, then ascending id. Kept are those with fewer than ``top_k`` before them, less than ``top_p``
of the mass of all before them, and ``w >= min_p``. The draw is the first id at which the running
sum of kept weights, in id order, exceeds ``u`` times their sum; ``u`` is SplitMix64 of (key,
position). The reference sums in float64. The kernels sum blocks of weights in float32, in a fixed
order, and the blocks' sums in float64, so that only a limit or a draw within about 1e-6 of a border
can fall differently, and the same row always falls the same way.

Two launches. The first has a program per chunk of every row and leaves the chunk's best token and
its mass. The second finishes a greedy row with one program. Rows that draw get several: they derive
a weight below which no token can be kept (``_lowest`` in ``sample_kernels.py``), count and list
what lies above, and the last of them to arrive at the row's counter finds where top-k and top-p end
and draws: from the list, in registers, when it is short, as it is for the distributions of a
language model. Flat ones take several passes over the row by that one program.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from squall.kernels.cases import Case, random
from squall.kernels.lang import next_power_of_2
from squall.kernels.op import multiprocessors, op
from squall.kernels.sample_counts import count_tokens_, gather_ids, penalize_
from squall.kernels.sample_kernels import _draw_kernel, _survey_kernel
from squall.kernels.tuning import Config, Problem, Tunable, tuned

__all__ = ["count_tokens_", "gather_ids", "penalize_", "sample_tokens_"]

GREEDY = 1e-7
GROUP = 128  # tokens whose maximum bounds top-k
TAILS = 8  # weights up to which each chunk's mass bounds top-p
LEVELS = 4  # weights at which a row's tokens are counted by all its programs


def sample_tokens_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: Tensor,
    position: Tensor,
) -> Tensor:
    """int32 [S]."""
    vocab = logits.shape[1]
    places = torch.arange(vocab, device=logits.device)
    best = logits.amax(-1, keepdim=True)
    greedy = torch.where(logits == best, places, vocab).amin(-1)
    kept = kept_reference(logits, temperature, top_k, top_p, min_p)
    ends = kept.cumsum(-1, dtype=_sum_dtype(logits))
    target = uniforms_reference(key, position, ends.dtype).unsqueeze(-1) * ends[:, -1:]
    drawn = torch.searchsorted(ends, target, right=True).squeeze(-1)
    drawn = torch.minimum(drawn, torch.where(kept > 0, places, 0).amax(-1))
    ids = torch.where(temperature < GREEDY, greedy, drawn)
    return torch.where(best.squeeze(-1).isfinite(), ids, -1).int()


def kept_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Weights float32 [S, V], 0 of the tokens that top-k, top-p and min-p drop."""
    vocab = logits.shape[1]
    best = logits.amax(-1, keepdim=True)
    weights = ((logits - best) / temperature.clamp(min=GREEDY).unsqueeze(-1)).exp_()
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1, dtype=_sum_dtype(logits))
    count = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).unsqueeze(-1)
    mass = torch.where(top_p < 1, top_p.to(sums.dtype) * sums[:, -1], torch.inf).unsqueeze(-1)
    before = sums.roll(1, -1)
    before[:, :1] = 0
    keep = (torch.arange(vocab, device=logits.device) < count) & (before < mass)
    keep &= ordered >= min_p.unsqueeze(-1)
    return torch.zeros_like(weights).scatter_(-1, order, ordered.masked_fill_(~keep, 0))


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64


def uniforms_reference(key: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """SplitMix64 in int64, which wraps like uint64; as many bits as ``dtype`` holds."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = key + (position.long() + 1) * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    z = z ^ shifted(z, 31)
    bits = 52 if dtype == torch.float64 else 23
    return shifted(z, 64 - bits).to(dtype) * 2.0**-bits


def sample_tokens_in_place_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: Tensor,
    position: Tensor,
    ids: Tensor,
) -> None:
    ids.copy_(sample_tokens_reference(logits, temperature, top_k, top_p, min_p, key, position))


def _out_fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: Tensor,
    position: Tensor,
    ids: Tensor,
) -> None:
    return None


def _rule(rows: int, vocab: int) -> Config:
    """Tokens in a chunk, warps, tokens that are listed at most per chunk and per row.

    With chunks of 2048 one row of 128,256 logits has 63 programs, and two of the second kernel's
    fit into a multiprocessor's registers.
    """
    chunk = min(2048, max(GROUP, next_power_of_2(vocab)))
    return {"chunk": chunk, "warps": max(1, chunk // 256), "slots": chunk // 8, "list": chunk}


def _check(logits: Tensor, ids: Tensor, parameters: Sequence[tuple[str, Tensor]]) -> None:
    assert logits.dim() == 2, f"logits {logits.shape}"
    assert logits.dtype == torch.float32, f"logits {logits.dtype}"
    assert logits.stride(1) == 1, "rows must be dense"
    for name, tensor in (*parameters, ("ids", ids)):
        assert tensor.shape == logits.shape[:1], f"{name} {tensor.shape}, logits {logits.shape}"
        assert tensor.dtype == _DTYPES[name], f"{name} {tensor.dtype}"
        assert tensor.is_contiguous(), name


_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "key": torch.int64,
    "position": torch.int32,
    "ids": torch.int32,
}


def sample_tokens_launcher(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: Tensor,
    position: Tensor,
    ids: Tensor,
) -> None:
    parameters = (temperature, top_k, top_p, min_p, key, position)
    _check(logits, ids, tuple(zip(_DTYPES, parameters, strict=False)))
    rows, vocab = logits.shape
    if rows == 0:
        return
    config = tuned("sample_tokens", _tuning_key(rows, vocab), logits.device)
    launch(logits, parameters, ids, config or _rule(rows, vocab))


def launch(logits: Tensor, parameters: tuple[Tensor, ...], ids: Tensor, config: Config) -> None:
    """Both kernels with given launch parameters (those of ``_rule``); rows and V at least 1.

    ``parameters`` are those of the operator, temperature to position.
    """
    rows, vocab = logits.shape
    temperature, top_k, top_p = parameters[:3]
    chunk, slots, listed = config["chunk"], config["slots"], config["list"]
    chunks = -(-vocab // chunk)
    peaks = chunks * (chunk // GROUP)
    row_list = max(chunks * slots, listed)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((rows, *shape), dtype=dtype, device=logits.device)

    survey = (
        scratch(torch.int64, chunks),
        scratch(torch.float32, chunks),
        scratch(torch.float32, peaks),
        scratch(torch.float32, chunks, TAILS),
    )
    arrived = scratch(torch.int32)
    _survey_kernel[(chunks, rows)](
        logits, temperature, top_k, top_p, *survey, arrived,
        logits.stride(0), vocab, chunk, chunks, GROUP, TAILS,
        num_warps=config["warps"],
    )  # fmt: skip
    # As many programs as run at once: where none has anything to draw they are all that is paid.
    programs = min(chunks, max(1, 2 * multiprocessors(logits.device) // rows))
    _draw_kernel[(programs, rows)](
        logits, *parameters, *survey,
        scratch(torch.int32, chunks, LEVELS), scratch(torch.float32, chunks, LEVELS),
        scratch(torch.int64, row_list), arrived, ids,
        logits.stride(0), programs,
        vocab, chunk, chunks, next_power_of_2(chunks), peaks, next_power_of_2(peaks),
        TAILS, LEVELS, slots, listed, row_list,
        num_warps=config["warps"],
    )  # fmt: skip


sample_tokens_ = op(
    "sample_tokens_(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor key, Tensor position, Tensor(a!) ids) -> ()",
    sample_tokens_in_place_reference,
    sample_tokens_launcher,
    _out_fake,
)


def _tuning_key(rows: int, vocab: int) -> str:
    return f"v{vocab}-s{min(next_power_of_2(rows), 256)}"


# temperature, top_k, top_p, min_p
_GREEDY = (0.0, 0, 1.0, 0.0)
MIX: tuple[tuple[float, int, float, float], ...] = (
    (1.0, 0, 1.0, 0.0),
    _GREEDY,
    (0.7, 20, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (0.9, 0, 1.0, 0.3),
    (0.8, 40, 0.95, 0.05),
    (0.0, 5, 0.5, 0.5),
    (1.0, 1, 1.0, 0.0),
    (2.0, 700, 0.9, 0.0),
    (1.0, -1, 1e-6, 1.0),
    (1e-6, 1 << 30, 0.5, 0.0),
)


def parameters(
    mix: Sequence[tuple[float, int, float, float]], rows: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The operator's parameters, temperature to position: ``mix`` repeated over ``rows``."""
    columns = list(zip(*(mix[i % len(mix)] for i in range(rows)), strict=True)) or [()] * 4
    dtypes = torch.float32, torch.int32, torch.float32, torch.float32
    values = [torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)]
    generator = torch.Generator().manual_seed(rows)
    key = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    position = torch.arange(rows, dtype=torch.int32) * 37
    return tuple(t.to(device) for t in (*values, key, position))


def _peaked(x: Tensor) -> Tensor:
    """Like a language model's: a few candidates far above the rest."""
    return x.pow(3) * 2


def _masked(x: Tensor) -> Tensor:
    """As a grammar leaves them."""
    return x.masked_fill(x < 0.5, -torch.inf)


def _broken(x: Tensor) -> Tensor:
    """NaN, inf and no finite logit at all, each in every fourth row."""
    x[0::4, -1] = torch.nan
    x[1::4, 0] = torch.inf
    x[2::4] = -torch.inf
    return x


SHAPES: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "flat": torch.clone,
        "peaked": _peaked,
        "tied": torch.round,
        "equal": torch.zeros_like,
        "masked": _masked,
        "broken": _broken,
    }
)


def _case(shape: str, rows: int, vocab: int, strided: bool = False, aot: bool = False) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        x = random((rows, vocab + 5 * strided), torch.float32, torch.device("cpu"), 41)
        logits = SHAPES[shape](x).to(device)[:, 5 * strided :]
        ids = torch.full((rows,), 7, dtype=torch.int32, device=device)
        return logits, *parameters(MIX, rows, device), ids

    return Case(
        f"sample_tokens_-{shape}-{rows}x{vocab}{'-strided' if strided else ''}",
        sample_tokens_,
        sample_tokens_in_place_reference,
        sample_tokens_launcher,
        build,
        mutates=(7,),
        interpret=vocab <= 10_000,
        aot=(torch.float32,) * aot,
    )


def _cases() -> Iterator[Case]:
    for shape in SHAPES:
        for vocab in (63, 1000):
            yield _case(shape, len(MIX), vocab, aot=shape == "flat" and vocab == 1000)
    yield _case("flat", len(MIX), 1)
    yield _case("flat", 0, 1000)
    yield _case("flat", len(MIX), 1000, strided=True)
    yield _case("peaked", len(MIX), 9001)
    # Tokens of a large flat row are as narrow as the rounding of float32 sums: no exact answer.
    yield _case("peaked", 1, 128_256, aot=True)
    for shape in ("peaked", "equal", "broken"):
        yield _case(shape, 2 * len(MIX), 128_256)
    yield _case("peaked", 300, 32_000)
    yield _case("peaked", 3, 262_144)


CASES = tuple(_cases())


def _problem(rows: int, vocab: int) -> Problem:
    """A greedy batch: what most requests are, and what has the least time."""

    def build(device: torch.device) -> Callable[[Config], None]:
        copies = max(1, (256 << 20) // (4 * rows * vocab))
        sources = [random((rows, vocab), torch.float32, device, i) for i in range(copies)]
        values = parameters((_GREEDY,), rows, device)
        ids = torch.empty(rows, dtype=torch.int32, device=device)
        turn = 0

        def run(config: Config) -> None:
            nonlocal turn
            turn = (turn + 1) % copies
            launch(sources[turn], values, ids, config)

        return run

    rule = _rule(rows, vocab)
    candidates = [
        {**rule, "chunk": chunk, "warps": warps}
        for chunk in (2048, 4096, 8192)
        for warps in (4, 8, 16)
    ]
    return Problem(_tuning_key(rows, vocab), 4 * rows * vocab, build, candidates)


def _problems(shapes: Sequence[tuple[int, int]]) -> Iterable[Problem]:
    """Logits come from the matrix with the most rows, the head."""
    vocab = max((features for features, _ in shapes), default=0)
    return [_problem(rows, vocab) for rows in (1, 8, 32, 256) if vocab > 4096]


TUNABLE = Tunable("sample_tokens", _problems)
