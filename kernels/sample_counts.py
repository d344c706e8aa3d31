"""The small operators around sampling: penalties, the token counts they need, and next inputs.

``penalize_(logits, counts, slots, repetition, frequency, presence)`` edits ``logits`` float32
``[S, V]`` (rows may be strided) in place. ``counts`` int32 ``[N, V]`` says how often each token
occurred in each of N sequences, ``slots`` int32 ``[S]`` which of them a row belongs to (-1: no
penalties). For tokens that occurred:

    x = (x / repetition  if x > 0  else  x * repetition) - count * frequency - presence

(Keskar et al. 2019, arXiv:1909.05858, as transformers has it, then the OpenAI formula.) The
penalties are float32 ``[S]``.

``count_tokens_(counts, slots, ids)`` adds 1 to ``counts[slots[i], ids[i]]`` for every i where both
are non-negative; ``ids`` int32 ``[S]``, below V.

``gather_ids(sampled, source)`` gives the token ids int32 ``[S]`` of the next step: for
``source`` int32 or int64 ``[S]`` non-negative, ``sampled[source]`` (int32, ids of the step before);
negative, ``-1 - source``, an id the host knows. A row that failed has the id -1; it becomes 0,
because the embedding must find a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from squall.kernels.cases import Case, random
from squall.kernels.lang import tl
from squall.kernels.launch import kernel
from squall.kernels.op import op

# mypy: disable-error-code="no-untyped-def"

BLOCK = 1024


def penalize_reference(
    logits: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    if counts.shape[0] == 0:
        return
    penalised = slots.unsqueeze(-1) >= 0
    count = counts.index_select(0, slots.clamp(min=0).long())
    r, f, p = (t.unsqueeze(-1) for t in (repetition, frequency, presence))
    edited = torch.where(logits > 0, logits / r, logits * r) - count * f - p
    logits.copy_(torch.where(penalised & (count > 0), edited, logits))


def _penalize_fake(
    logits: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    return None


def count_tokens_reference(counts: Tensor, slots: Tensor, ids: Tensor) -> None:
    counted = (slots >= 0) & (ids >= 0)
    if counts.numel() == 0:
        return
    index = slots.clamp(min=0).long(), ids.clamp(min=0).long()
    counts.index_put_(index, counted.to(counts.dtype), accumulate=True)


def _count_fake(counts: Tensor, slots: Tensor, ids: Tensor) -> None:
    return None


def gather_ids_reference(sampled: Tensor, source: Tensor) -> Tensor:
    """int32 [S]."""
    if sampled.shape[0] == 0:
        return (-1 - source).int()
    taken = sampled.index_select(0, source.clamp(min=0).long())
    return torch.where(source >= 0, taken, -1 - source).clamp(min=0).int()


@kernel
def _penalize_kernel(
    logits_ptr,
    counts_ptr,
    slots_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    logits_stride,
    counts_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of the vocabulary, rows)."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = ids < VOCAB
        count = tl.load(counts_ptr + slot * counts_stride + ids, mask=mask, other=0)
        mask &= count > 0
        target = logits_ptr + row * logits_stride + ids
        x = tl.load(target, mask=mask, other=0.0)
        repetition = tl.load(repetition_ptr + row)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x -= count.to(tl.float32) * tl.load(frequency_ptr + row)
        tl.store(target, x - tl.load(presence_ptr + row), mask=mask)


@kernel(do_not_specialize=["rows"])
def _count_kernel(counts_ptr, slots_ptr, ids_ptr, rows, counts_stride, BLOCK: tl.constexpr):
    """Grid (blocks of rows,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    token = tl.load(ids_ptr + row, mask=row < rows, other=-1)
    tl.atomic_add(
        counts_ptr + slot * counts_stride + token, 1, mask=(slot >= 0) & (token >= 0), sem="relaxed"
    )


@kernel(do_not_specialize=["rows"])
def _gather_kernel(sampled_ptr, source_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    """Grid (blocks of rows,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row, mask=row < rows, other=-1)
    taken = tl.load(sampled_ptr + source, mask=source >= 0, other=0)
    token = tl.where(source >= 0, taken, -1 - source)
    tl.store(out_ptr + row, tl.maximum(token, 0).to(tl.int32), mask=row < rows)


def penalize_launcher(
    logits: Tensor,
    counts: Tensor,
    slots: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32, f"logits {logits.dtype}"
    assert counts.dtype == torch.int32, f"counts {counts.dtype}"
    assert counts.shape[1] == vocab, f"counts {counts.shape}, logits {logits.shape}"
    assert logits.stride(1) == counts.stride(1) == 1, "rows must be dense"
    for name, t in (("repetition", repetition), ("frequency", frequency), ("presence", presence)):
        assert t.shape == (rows,), f"{name} {t.shape}"
        assert t.dtype == torch.float32, f"{name} {t.dtype}"
        assert t.is_contiguous(), name
    _check_slots(slots, rows)
    if logits.numel() == 0 or counts.shape[0] == 0:
        return
    _penalize_kernel[(-(-vocab // BLOCK), rows)](
        logits,
        counts,
        slots,
        repetition,
        frequency,
        presence,
        logits.stride(0),
        counts.stride(0),
        vocab,
        BLOCK,
        num_warps=4,
    )


def _check_slots(slots: Tensor, rows: int) -> None:
    assert slots.shape == (rows,), f"slots {slots.shape} for {rows} rows"
    assert slots.dtype == torch.int32, f"slots {slots.dtype}"
    assert slots.is_contiguous(), "slots"


def count_tokens_launcher(counts: Tensor, slots: Tensor, ids: Tensor) -> None:
    assert counts.dtype == ids.dtype == torch.int32, f"counts {counts.dtype}, ids {ids.dtype}"
    assert counts.stride(1) == 1, "rows must be dense"
    assert ids.is_contiguous(), "ids"
    assert ids.dim() == 1, f"ids {ids.shape}"
    _check_slots(slots, ids.shape[0])
    if counts.numel() == 0 or ids.shape[0] == 0:
        return
    block = 128
    grid = (-(-ids.shape[0] // block),)
    _count_kernel[grid](counts, slots, ids, ids.shape[0], counts.stride(0), block, num_warps=4)


def gather_ids_launcher(sampled: Tensor, source: Tensor) -> Tensor:
    assert sampled.dtype == torch.int32, f"sampled {sampled.dtype}"
    assert source.dtype in (torch.int32, torch.int64), f"source {source.dtype}"
    assert sampled.is_contiguous(), "sampled"
    assert source.is_contiguous(), "source"
    out = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    if source.shape[0] == 0:
        return out
    block = 128
    grid = (-(-source.shape[0] // block),)
    _gather_kernel[grid](sampled, source, out, source.shape[0], block, num_warps=4)
    return out


penalize_ = op(
    "penalize_(Tensor(a!) logits, Tensor counts, Tensor slots, Tensor repetition, "
    "Tensor frequency, Tensor presence) -> ()",
    penalize_reference,
    penalize_launcher,
    _penalize_fake,
)
count_tokens_ = op(
    "count_tokens_(Tensor(a!) counts, Tensor slots, Tensor ids) -> ()",
    count_tokens_reference,
    count_tokens_launcher,
    _count_fake,
)
gather_ids = op(
    "gather_ids(Tensor sampled, Tensor source) -> Tensor", gather_ids_reference, gather_ids_launcher
)


def _slots(rows: int, device: torch.device) -> Tensor:
    """Every third row has none; the others in descending order."""
    slots = [-1 if i % 3 == 2 else rows - 1 - i for i in range(rows)]
    return torch.tensor(slots, dtype=torch.int32, device=device)


def _counts(rows: int, vocab: int, device: torch.device) -> Tensor:
    counts = random((rows, vocab), torch.float32, device, 31).mul_(2).int().clamp_(min=0)
    return counts


def _penalize_case(rows: int, vocab: int, strided: bool) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        logits = random((rows, vocab + 8 * strided), torch.float32, device, 32)[:, :vocab] * 3
        if strided:
            logits = random((rows, vocab + 8), torch.float32, device, 32)[:, 8:]
        values = torch.linspace(0.5, 1.9, rows, device=device)
        slots, counts = _slots(rows, device), _counts(rows, vocab, device)
        return logits, counts, slots, values, values - 1, 0.7 - values

    return Case(
        f"penalize_-{rows}x{vocab}{'-strided' if strided else ''}",
        penalize_,
        penalize_reference,
        penalize_launcher,
        build,
        mutates=(0,),
        interpret=vocab <= 4096,
        aot=(torch.float32,) * (vocab == 1000),
    )


def _count_case(rows: int, vocab: int) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        ids = torch.arange(rows, device=device, dtype=torch.int32) * 7 % (vocab + 1) - 1
        slots = _slots(rows, device).clamp_(max=max(rows // 2, 1) - 1)  # some rows share one
        return _counts(max(rows // 2, 1), vocab, device), slots, ids

    name, aot = f"count_tokens_-{rows}x{vocab}", (torch.float32,) * (rows == 5)
    fn, reference, launcher = count_tokens_, count_tokens_reference, count_tokens_launcher
    return Case(name, fn, reference, launcher, build, mutates=(0,), aot=aot)


def _gather_case(rows: int, index: torch.dtype) -> Case:
    def build(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        sampled = torch.arange(rows + 3, device=device, dtype=torch.int32) * 1000 - 1
        row = torch.arange(rows, device=device)
        return sampled, torch.where(row % 4 == 1, -1 - row * 5, rows - 1 - row).to(index)

    name = f"gather_ids-{rows}-{str(index).removeprefix('torch.')}"
    aot = (torch.float32,) * (rows == 5)
    return Case(name, gather_ids, gather_ids_reference, gather_ids_launcher, build, aot=aot)


def _cases() -> Iterator[Case]:
    for rows, vocab in ((5, 1000), (0, 64), (1, 1), (3, 63), (4, 2049), (7, 128_256)):
        yield _penalize_case(rows, vocab, strided=False)
    yield _penalize_case(4, 1000, strided=True)
    for rows, vocab in ((5, 1000), (0, 64), (1, 1), (300, 63)):
        yield _count_case(rows, vocab)
    for rows in (5, 0, 1, 300):
        yield _gather_case(rows, torch.int32)
        yield _gather_case(rows, torch.int64)


CASES = tuple(_cases())
