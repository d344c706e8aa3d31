"""The two kernels of ``sample.py``, whose docstring says what they compute.

Both see a row as CHUNKS chunks of CHUNK tokens. The scratch between them: ``tops`` int64
``[S, CHUNKS]``, ``order_key`` of the best token; ``masses`` float32 ``[S, CHUNKS]``, the weights
summed relative to the chunk's best; ``peaks`` float32 ``[S, CHUNKS * CHUNK / GROUP]``, the best
logit of every GROUP tokens; ``tails`` float32 ``[S, CHUNKS, TAILS]``, see ``raise_by_tails``.
Within the second: ``counts`` int32 and ``sums`` float32 ``[S, CHUNKS, LEVELS]``, number and mass of
the tokens above each level; ``listed`` int64 ``[S, LISTED]``, tokens as ``id << 32 | bits``, SLOTS
a chunk; ``arrived`` int32 ``[S]``, the programs that are done with their chunks.
"""

from squall.kernels.lang import tl, triton
from squall.kernels.launch import kernel
from squall.kernels.sample_search import (
    choose_from_list,
    choose_from_row,
    key_id,
    key_logit,
    load_tile,
    order_key,
    raise_by_groups,
    raise_by_tails,
    search_row,
    uniform,
    weigh,
    weigh_chunks,
)

# mypy: disable-error-code="no-untyped-def"


@kernel
def _survey_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    tops_ptr,
    masses_ptr,
    peaks_ptr,
    tails_ptr,
    arrived_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    TAILS: tl.constexpr,
):
    """Grid (chunks, rows)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < VOCAB, other=-float("inf"))
    top = tl.max(order_key(x, ids))
    place = row * CHUNKS + chunk
    tl.store(tops_ptr + place, top)
    if chunk == 0:
        tl.store(arrived_ptr + row, 0)
    if temperature >= 1e-7:
        best = key_logit(top)
        finite = tl.abs(best) < float("inf")
        weights = weigh(
            tl.where(finite, x, -float("inf")),
            tl.where(finite, best, 0.0),
            1.4426950408889634 / temperature,
        )
        tl.store(masses_ptr + place, tl.sum(weights))
        if tl.load(top_p_ptr + row) < 1.0:
            for tail in tl.static_range(TAILS):
                lighter = weights <= 0.25 ** (tail + 1)
                tl.store(tails_ptr + place * TAILS + tail, tl.sum(tl.where(lighter, weights, 0.0)))
        if tl.load(top_k_ptr + row) > 0:
            PEAKS: tl.constexpr = CHUNK // GROUP
            peaks = tl.max(tl.reshape(x, [PEAKS, GROUP]), 1)
            tl.store(peaks_ptr + place * PEAKS + tl.arange(0, PEAKS), peaks)


@triton.jit
def _lowest(
    peaks_ptr,
    tails_ptr,
    masses,
    scales,
    best,
    rate,
    low,
    top_k,
    top_p,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    PEAKS: tl.constexpr,
    PEAK_COLUMNS: tl.constexpr,
    TAILS: tl.constexpr,
):
    """A greater ``low``: bits of a weight that neither top-p nor top-k reach."""
    if top_p < 1.0:
        dropped = tl.sum(masses * scales) * (1.0 - top_p)
        low = raise_by_tails(tails_ptr, masses, scales, low, dropped, CHUNKS, TAILS)
        # Tokens up to this weight, were it all of them, weigh half of what top-p drops.
        light = dropped * (0.5 / VOCAB)
        low = tl.maximum(low, light.to(tl.int32, bitcast=True))
    if top_k < VOCAB:
        group = tl.arange(0, PEAK_COLUMNS)
        peaks = tl.load(peaks_ptr + group, mask=group < PEAKS, other=-float("inf"))
        low = raise_by_groups(weigh(peaks, best, rate).to(tl.int32, bitcast=True), low, top_k)
    return low


@triton.jit
def _count_chunk(
    row_ptr,
    counts_ptr,
    sums_ptr,
    listed_ptr,
    chunk,
    best,
    rate,
    low,
    cuts,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Number and mass of a chunk's tokens above each level, and a list of those above the first.

    Where nothing ``cuts`` the row, only the mass above the first level.
    """
    ids, weights = load_tile(row_ptr, chunk, best, rate, VOCAB, CHUNK)
    bits = weights.to(tl.int32, bitcast=True)
    counts_ptr += chunk * LEVELS
    sums_ptr += chunk * LEVELS
    tl.store(sums_ptr, tl.sum(tl.where(bits > low, weights, 0.0)))
    if cuts:
        listed = bits > low
        places = tl.cumsum(listed.to(tl.int32), 0) - 1
        # A list that does not fit is cut off: its count says that it is not complete.
        tl.store(
            listed_ptr + chunk * SLOTS + places,
            (ids.to(tl.int64) << 32) | bits.to(tl.int64),
            mask=listed & (places < SLOTS),
        )
        tl.store(counts_ptr, tl.sum(listed.to(tl.int32)))
        step = (0x3F800000 - low) // LEVELS
        for level in tl.static_range(1, LEVELS):
            above = bits > low + step * level
            tl.store(counts_ptr + level, tl.sum(above.to(tl.int32)))
            tl.store(sums_ptr + level, tl.sum(tl.where(above, weights, 0.0)))


@triton.jit
def _draw_cut(
    row_ptr,
    peaks_ptr,
    tails_ptr,
    counts_ptr,
    sums_ptr,
    listed_ptr,
    arrived_ptr,
    program,
    programs,
    masses,
    scales,
    best,
    rate,
    floor,
    top_k,
    top_p,
    cuts,
    random,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PEAKS: tl.constexpr,
    PEAK_COLUMNS: tl.constexpr,
    TAILS: tl.constexpr,
    LEVELS: tl.constexpr,
    SLOTS: tl.constexpr,
    LIST: tl.constexpr,
):
    """The token of a row of which something may be dropped; -1 in all programs but the last.

    Pointers are to what belongs to the row. ``masses`` of its chunks [COLUMNS] are relative to
    their best tokens, which weigh ``scales``.
    """
    total = tl.sum((masses * scales).to(tl.float64))
    limit = tl.where(top_p < 1.0, total * top_p.to(tl.float64), total * float("inf"))
    low = _lowest(
        peaks_ptr, tails_ptr, masses, scales, best, rate, floor, top_k, top_p,
        VOCAB, CHUNKS, PEAKS, PEAK_COLUMNS, TAILS,
    )  # fmt: skip
    for chunk in range(program, CHUNKS, programs):
        _count_chunk(
            row_ptr, counts_ptr, sums_ptr, listed_ptr, chunk, best, rate, low, cuts,
            VOCAB, CHUNK, LEVELS, SLOTS,
        )  # fmt: skip
    tl.debug_barrier()  # the stores of all threads come before the arrival
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    token = -1
    if arrived == programs - 1:
        column = tl.arange(0, COLUMNS)[:, None]
        level = tl.arange(0, LEVELS)
        place = column * LEVELS + level[None, :]
        mask = column < CHUNKS
        sums = tl.load(sums_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        sums = sums.to(tl.float64)
        edge = floor
        ties = 0
        kept = tl.sum(tl.where(level[None, :] == 0, sums, 0.0), 1)
        before = tl.zeros([COLUMNS], tl.int32)
        if cuts:
            counts = tl.load(counts_ptr + place, mask=mask, other=0, cache_modifier=".cg")
            count = tl.sum(counts, 0)
            mass = tl.sum(sums, 0)
            outside = (level == 0) | (count >= top_k) | (mass >= limit)
            last = tl.sum(outside.to(tl.int32)) - 1  # the highest level that is outside
            step = (0x3F800000 - low) // LEVELS
            high = tl.where(last == LEVELS - 1, 0x3F800000, low + step * (last + 1))
            low += step * last
            size = tl.sum(tl.where(level == 0, count, 0))
            lengths = tl.sum(tl.where(level[None, :] == 0, counts, 0), 1)
            if (tl.max(lengths) <= SLOTS) & (size <= LIST):
                token = choose_from_list(
                    listed_ptr, counts_ptr, lengths, size, low, high, top_k, limit, random,
                    CHUNKS, COLUMNS, SLOTS, LIST,
                )  # fmt: skip
            else:
                above = tl.sum(tl.where(level == last + 1, count, 0))
                between = tl.sum(tl.where(level == last, count, 0)) - above
                edge, ties = search_row(
                    row_ptr, listed_ptr, best, rate, low, high, between, above,
                    tl.sum(tl.where(level == last + 1, mass, 0.0)), top_k, limit,
                    VOCAB, CHUNK, CHUNKS, LIST,
                )  # fmt: skip
                kept, before = weigh_chunks(
                    row_ptr, best, rate, edge, ties, VOCAB, CHUNK, CHUNKS, COLUMNS
                )
        if token < 0:
            token = choose_from_row(
                row_ptr, best, rate, edge, ties, kept, before, random, VOCAB, CHUNK, COLUMNS
            )
    return token


@kernel(do_not_specialize=["programs"])
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    key_ptr,
    position_ptr,
    tops_ptr,
    masses_ptr,
    peaks_ptr,
    tails_ptr,
    counts_ptr,
    sums_ptr,
    listed_ptr,
    arrived_ptr,
    out_ptr,
    row_stride,
    programs,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PEAKS: tl.constexpr,
    PEAK_COLUMNS: tl.constexpr,
    TAILS: tl.constexpr,
    LEVELS: tl.constexpr,
    SLOTS: tl.constexpr,
    LIST: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Grid (programs, rows). CHUNKS, PEAKS padded to powers of two: COLUMNS, PEAK_COLUMNS."""
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    draws = temperature >= 1e-7
    column = tl.arange(0, COLUMNS)
    tops = tl.load(
        tops_ptr + row * CHUNKS + column, mask=column < CHUNKS, other=-0x8000000000000000
    )
    top = tl.max(tops)
    best = key_logit(top)
    usable = tl.abs(best) < float("inf")
    if draws & usable:
        rate = 1.4426950408889634 / temperature
        least = tl.load(min_p_ptr + row).to(tl.int32, bitcast=True)
        floor = tl.minimum(tl.maximum(least, 1), 0x3F800000) - 1
        top_k = tl.load(top_k_ptr + row)
        top_k = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB)
        top_p = tl.load(top_p_ptr + row)
        cuts = (top_k < VOCAB) | (top_p < 1.0)
        random = uniform(tl.load(key_ptr + row), tl.load(position_ptr + row))
        masses = tl.load(masses_ptr + row * CHUNKS + column, mask=column < CHUNKS, other=0.0)
        tops = tl.where(column < CHUNKS, tops, top)
        scales = weigh(key_logit(tops), best, rate)
        row_ptr = logits_ptr + row * row_stride
        if cuts | (floor > 0):
            token = _draw_cut(
                row_ptr, peaks_ptr + row * PEAKS, tails_ptr + row * (CHUNKS * TAILS),
                counts_ptr + row * (CHUNKS * LEVELS), sums_ptr + row * (CHUNKS * LEVELS),
                listed_ptr + row * LISTED, arrived_ptr + row, program, programs, masses, scales,
                best, rate, floor, top_k, top_p, cuts, random,
                VOCAB, CHUNK, CHUNKS, COLUMNS, PEAKS, PEAK_COLUMNS, TAILS, LEVELS, SLOTS, LIST,
            )  # fmt: skip
            tl.store(out_ptr + row, token, mask=token >= 0)
        else:
            if program == 0:
                kept = (masses * scales).to(tl.float64)
                before = tl.zeros([COLUMNS], tl.int32)
                token = choose_from_row(
                    row_ptr, best, rate, 0, 0, kept, before, random, VOCAB, CHUNK, COLUMNS
                )
                tl.store(out_ptr + row, token)
    else:
        if program == 0:
            tl.store(out_ptr + row, tl.where(usable, key_id(top), -1))
