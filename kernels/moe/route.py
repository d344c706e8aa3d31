"""Routing: the experts of each token and their weights.

``route`` takes the router's ``logits``, float32 ``[T, E]``, and gives ``ids`` int32 ``[T, k]`` and
``weights`` float32 ``[T, k]``, the best expert first. ``scoring`` says how logits become scores:

    "softmax"      softmax over all experts
    "sigmoid"      each expert by itself (DeepSeek-AI 2024, arXiv:2412.19437)
    "top_softmax"  softmax over the logits of the chosen experts (GPT-OSS)
    "top_sigmoid"  the same with sigmoid: logits choose (Llama 4)
    "sparsemixer"  experts are chosen one after the other; each one's weight is its softmax among
                   those not chosen yet whose logit is near: (best - s) / max(|s|, best) <= 2 jitter
                   (Liu et al. 2024, arXiv:2409.12136)

``correction`` (float32 ``[E]`` or None) is added to the scores to choose, not to the weights. With
``groups`` > 1 experts are cut into as many equal groups of neighbours, of which the ``top_groups``
best stay: a group's score is the sum of its ``group_best`` best scores. ``renormalize`` divides the
weights by their sum; ``scale`` multiplies them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.cases import Case, random
from squall.kernels.lang import next_power_of_2, tl, triton, wait_for_inputs
from squall.kernels.launch import kernel
from squall.kernels.op import dependent_launch, op

SCORINGS = ("softmax", "sigmoid", "top_softmax", "top_sigmoid", "sparsemixer")
_LEAST_SUM = 1e-20  # of weights that are divided by their sum


def route_reference(
    logits: Tensor,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_best: int,
    jitter: float,
) -> tuple[Tensor, Tensor]:
    if scoring == "sparsemixer":
        ids, weights = _sparsemixer(logits, top_k, jitter)
    else:
        first = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}
        scores = first[scoring](logits) if scoring in first else logits
        choice = scores if correction is None else scores + correction
        if groups > 1:
            choice = _limit_groups(choice, groups, top_groups, group_best)
        ids = choice.topk(top_k).indices
        weights = scores.gather(1, ids)
        if scoring == "top_softmax":
            weights = weights.softmax(-1)
        elif scoring == "top_sigmoid":
            weights = weights.sigmoid()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST_SUM)
    return ids.int(), weights * scale


def _limit_groups(choice: Tensor, groups: int, top_groups: int, group_best: int) -> Tensor:
    """``choice [T, E]`` with minus infinity in all but the best groups."""
    grouped = choice.view(choice.shape[0], groups, -1)
    best = grouped.topk(group_best).values.sum(-1).topk(top_groups).indices
    dropped = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device)
    dropped.scatter_(1, best, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view_as(choice)


def _sparsemixer(logits: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    left, ids, weights = logits.clone(), [], []
    for _ in range(top_k):
        best, index = left.max(-1, keepdim=True)
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        ids.append(index)
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, index))
        left = left.scatter(1, index, float("-inf"))
    return torch.cat(ids, 1), torch.cat(weights, 1)


@triton.jit
def _best(x, e, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of ``x`` and its place, the first of equals; some place if all are NaN."""
    best = tl.max(x, axis=0)
    return best, tl.minimum(tl.min(tl.where(x == best, e, E), axis=0), E - 1)


@triton.jit
def _in_best_groups(  # type: ignore[no-untyped-def]
    choice, e, E: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, BEST: tl.constexpr
):
    """``choice`` with minus infinity in all but the TOP best of GROUPS groups."""
    SIZE: tl.constexpr = E // GROUPS
    own = e // SIZE
    rank = tl.zeros(choice.shape, tl.float32)  # each expert's group's score
    scores = ()
    for g in tl.static_range(GROUPS):
        score = 0.0
        members = tl.where(own == g, choice, float("-inf"))
        for _ in tl.static_range(BEST):
            best, index = _best(members, e, E)
            score += best
            members = tl.where(e == index, float("-inf"), members)
        scores += (score,)  # type: ignore[assignment]
        rank = tl.where(own == g, score, rank)
    better = tl.zeros(choice.shape, tl.int32)  # groups before it, the first of equals first
    for g in tl.static_range(GROUPS):
        ahead = (scores[g] > rank) | ((scores[g] == rank) & (g < own))
        better += tl.where(ahead, 1, 0)
    return tl.where(better < TOP, choice, float("-inf"))


@kernel(do_not_specialize=["scale", "jitter"])
def _route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    correction_ptr,
    ids_ptr,
    weights_ptr,
    scale,
    jitter,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    e, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    wait_for_inputs(PDL)
    logits = tl.load(logits_ptr + token * E + e, mask=e < E, other=float("-inf"))
    scores = logits
    if SCORING == "softmax":
        scores = tl.exp(logits - tl.max(logits, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    elif SCORING == "sigmoid":
        scores = tl.sigmoid(logits)
    choice = scores
    if correction_ptr is not None:
        choice += tl.load(correction_ptr + e, mask=e < E, other=0.0)
    choice = tl.where(e < E, choice, float("-inf"))
    if GROUPS > 1:
        choice = _in_best_groups(choice, e, E, GROUPS, TOP_GROUPS, GROUP_BEST)
    ids = tl.zeros([BLOCK_K], tl.int32)
    weights = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best, index = _best(choice, e, E)
        if SCORING == "sparsemixer":
            far = (best - logits) / tl.maximum(tl.abs(logits), best) > 2 * jitter
            near = tl.where(far, float("-inf"), choice)
            weight = 1.0 / tl.sum(tl.exp(near - best), axis=0)
        else:
            weight = tl.sum(tl.where(e == index, scores, 0.0), axis=0)
        ids = tl.where(slot == k, index, ids)
        weights = tl.where(slot == k, weight, weights)
        choice = tl.where(e == index, float("-inf"), choice)
    if SCORING == "top_softmax":
        weights = tl.exp(weights - tl.max(weights, axis=0))
        weights = weights / tl.sum(weights, axis=0)
    elif SCORING == "top_sigmoid":
        weights = tl.sigmoid(weights)
    if RENORMALIZE:
        total = tl.sum(tl.where(slot < TOP_K, weights, 0.0), axis=0)
        weights = weights / tl.maximum(total, 1e-20)
    place = token * TOP_K + slot
    tl.store(ids_ptr + place, ids, mask=slot < TOP_K)
    tl.store(weights_ptr + place, weights * scale, mask=slot < TOP_K)


def route_launcher(
    logits: Tensor,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_best: int,
    jitter: float,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous(), "logits"  # noqa: PT018
    assert scoring in SCORINGS, scoring
    assert experts % groups == 0, f"{experts} experts in {groups} groups"
    ids, weights = _route_fake(logits, correction, top_k)
    if tokens:
        launch = dependent_launch(logits.device)
        _route_kernel[(tokens,)](
            logits, correction, ids, weights, scale, jitter, experts, top_k, scoring, renormalize,
            groups, top_groups, group_best, next_power_of_2(experts), next_power_of_2(top_k),
            bool(launch), num_warps=1 if experts <= 256 else 4, **launch,
        )  # fmt: skip
    return ids, weights


def _route_fake(
    logits: Tensor, correction: Tensor | None, top_k: int, *_rest: object
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


route = op(
    "route(Tensor logits, Tensor? correction, int top_k, str scoring, bool renormalize,"
    " float scale, int groups, int top_groups, int group_best, float jitter) -> (Tensor, Tensor)",
    route_reference,
    route_launcher,
    _route_fake,
)


def _case(
    size: tuple[int, int, int],
    scoring: str,
    renormalize: bool = False,
    groups: tuple[int, int, int] = (1, 1, 1),
    corrected: bool = False,
) -> Case:
    """``size`` is tokens, experts, experts a token."""
    tokens, experts, top_k = size

    def build(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
        logits = random((tokens, experts), torch.float32, device, 71)
        correction = random((experts,), torch.float32, device, 72) if corrected else None
        return logits, correction, top_k, scoring, renormalize, 1.5, *groups, 0.3

    name = f"route-{scoring}-{'x'.join(map(str, size))}-{groups[1]}of{groups[0]}"
    name += "-corrected" * corrected
    aot = (torch.float32,) if tokens == 3 else ()
    return Case(name, route, route_reference, route_launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    yield _case((3, 128, 8), "softmax", renormalize=True)
    yield _case((0, 8, 2), "softmax")
    yield _case((5, 60, 4), "softmax", corrected=True)
    yield _case((4, 160, 6), "softmax", groups=(8, 3, 1))
    yield _case((3, 256, 8), "sigmoid", renormalize=True, groups=(8, 4, 2), corrected=True)
    yield _case((2, 6, 6), "sigmoid", renormalize=True)
    yield _case((3, 32, 4), "top_softmax")
    yield _case((6, 16, 1), "top_sigmoid")
    yield _case((3, 16, 2), "sparsemixer")


CASES = tuple(_cases())
