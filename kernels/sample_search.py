"""What the sampling kernels of ``sample.py`` are made of: weights, uniforms, and a row's cut.

A token's weight is ``exp((logit - best) / temperature)`` in (0, 1], float32. Weights are compared
by their bits: those of floats that are not negative are integers in the same order, and the best
token's are 0x3F800000. top-k, top-p and min-p all keep the tokens from some weight upwards, so
cutting a row is finding the least weight kept, the *edge*. With

    C(v), M(v)   number and mass of the tokens whose bits are greater than v
    inside(v)    C(v) < top_k  and  M(v) < top_p * (mass of all)  and  v >= the bits of min_p

``inside`` is true from some v upwards, and the edge is the least weight there is for which it is:
a binary search over integers, between ``low`` (false) and ``high`` (true). Of the tokens at the
edge itself as many are kept, by ascending id, as the limits leave room for.

Loops over a whole row are one program's alone: ``num_stages`` keeps enough loads in flight.
"""

from squall.kernels.lang import tl, triton

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def order_key(x, ids):
    """int64 that compares like (logit, lower id first); NaN is greater than everything."""
    bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))  # -0.0 ties with 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def key_logit(key):
    """The logit of an ``order_key``."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def key_id(key):
    """The token id of an ``order_key``."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def weigh(x, best, rate):
    """Weights; ``rate`` is log2(e) / temperature. The best logit gives exactly 1."""
    return tl.exp2((x - best) * rate)


@triton.jit
def uniform(key, position):
    """float64 in [0, 1): SplitMix64 as a counter, ``key`` int64 holding the bits of a uint64."""
    z = key.to(tl.uint64, bitcast=True) + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z >> 12).to(tl.float64) * 2.220446049250313e-16  # 2 ** -52


@triton.jit
def raise_by_groups(peaks, low, top_k):
    """A greater ``low`` for which top-k still is exceeded, from the bits of the greatest weight of
    disjoint groups of tokens: where k groups have a token above v, so has the row."""
    found = tl.sum((peaks > low).to(tl.int32))
    high = 0x3F800000
    if found >= top_k:
        while (high - low > 1) & (found > top_k + top_k // 8):
            middle = low + (high - low) // 2
            above = tl.sum((peaks > middle).to(tl.int32))
            if above >= top_k:
                low = middle
                found = above
            else:
                high = middle
    return low


@triton.jit
def raise_by_tails(
    tails_ptr, masses, scales, low, dropped, CHUNKS: tl.constexpr, TAILS: tl.constexpr
):
    """A greater ``low`` for which top-p still is exceeded: a weight such that all tokens up to it
    together have no more mass than is ``dropped``.

    Of each chunk: ``tails_ptr`` float32 ``[CHUNKS, TAILS]``, mass of the tokens of weight at most
    4^-1, 4^-2, ... of that of the chunk's best, which weighs ``scales``; ``masses``, of all of it.
    Both are relative to the chunk's best.
    """
    column = tl.arange(0, scales.shape[0])[:, None]
    depth = tl.arange(0, 32)[None, :] + 1  # the weight is 2 ** -depth
    # A bit nearer to the chunk's best than it is: its weights are rounded differently.
    below_best = depth + tl.log2(tl.maximum(scales, 1e-30))[:, None] - 0.001
    tail = tl.minimum(tl.floor(below_best * 0.5).to(tl.int32) - 1, TAILS - 1)
    place = tails_ptr + column * TAILS + tl.maximum(tail, 0)
    sums = tl.load(place, mask=(tail >= 0) & (column < CHUNKS), other=0.0)
    sums = tl.where(tail >= 0, sums, masses[:, None]) * scales[:, None]
    fits = tl.sum(sums, 0) <= dropped * 0.999
    bits = 0x3F800000 - ((tl.arange(0, 32) + 1) << 23)
    return tl.maximum(low, tl.max(tl.where(fits, bits, 0)))


@triton.jit
def load_tile(row_ptr, chunk, best, rate, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """Ids and weights of one chunk of a row; weight 0 past the vocabulary."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=-float("inf"))
    return ids, weigh(x, best, rate)


@triton.jit
def kept_weights(weights, edge, ties, seen):
    """The weights of what is kept, else 0; and ``seen``, the number of tokens at the edge before
    this tile, with those in it added. The first ``ties`` of them are kept."""
    bits = weights.to(tl.int32, bitcast=True)
    tied = (bits == edge).to(tl.int32)
    rank = seen + tl.cumsum(tied, 0)
    kept = (bits > edge) | ((tied == 1) & (rank <= ties))
    return tl.where(kept, weights, 0.0), seen + tl.sum(tied)


@triton.jit
def pick(ids, weights, target):
    """The first of the ascending ``ids`` at which the running sum of ``weights`` exceeds
    ``target``; where rounding lets none, the last that has any weight."""
    ends = tl.cumsum(weights, 0)
    passed = (weights > 0) & (ends > target.to(weights.dtype))
    first = tl.min(tl.where(passed, ids, 0x7FFFFFFF))
    last = tl.max(tl.where(weights > 0, ids, -1))
    return tl.where(first == 0x7FFFFFFF, last, first)


@triton.jit
def find_edge(bits, low, high, count, mass, top_k, limit):
    """The edge, and how many of the tokens at it are kept.

    ``bits`` of all tokens between ``low`` and ``high``, others 0 or also greater ones;
    ``count``, ``mass`` of the tokens that are greater than ``high`` and not among ``bits``.
    """
    weights = bits.to(tl.float32, bitcast=True)
    between = tl.sum(((bits > low) & (bits <= high)).to(tl.int32))
    while (high - low > 1) & (between > 1):
        middle = low + (high - low) // 2
        above = bits > middle
        fits_k = count + tl.sum(above.to(tl.int32)) < top_k
        if fits_k & (mass + tl.sum(tl.where(above, weights, 0.0)) < limit):
            high = middle
        else:
            low = middle
        between = tl.sum(((bits > low) & (bits <= high)).to(tl.int32))
    edge = tl.min(tl.where(bits > low, bits, 0x7FFFFFFF))
    edge = tl.where(edge == 0x7FFFFFFF, high, edge)  # min-p ended it, above all of ``bits``
    above = bits > edge
    room = tl.maximum(top_k - count - tl.sum(above.to(tl.int32)), 1)
    weight = edge.to(tl.float32, bitcast=True).to(tl.float64)
    fitting = (limit - (mass + tl.sum(tl.where(above, weights, 0.0)))) / weight
    ties = tl.minimum(tl.maximum(tl.ceil(fitting), 1.0), room.to(tl.float64))
    return edge, ties.to(tl.int32)


@triton.jit
def narrow_row(
    row_ptr,
    best,
    rate,
    low,
    high,
    between,
    count,
    mass,
    top_k,
    limit,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LIST: tl.constexpr,
):
    """Halve low..high, a pass over the row each time, until at most LIST tokens lie ``between`` or
    all of them weigh the same. ``count``, ``mass``: of the tokens greater than ``high``."""
    while (between > LIST) & (high - low > 1):
        middle = low + (high - low) // 2
        counts = tl.zeros([CHUNK], tl.int32)
        masses = tl.zeros([CHUNK], tl.float32)
        least = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
        most = tl.zeros([CHUNK], tl.int32)
        for chunk in tl.range(CHUNKS, num_stages=3):
            _, weights = load_tile(row_ptr, chunk, best, rate, VOCAB, CHUNK)
            bits = weights.to(tl.int32, bitcast=True)
            inner = (bits > low) & (bits <= high)
            upper = inner & (bits > middle)
            counts += upper.to(tl.int32)
            masses += tl.where(upper, weights, 0.0)
            least = tl.minimum(least, tl.where(inner, bits, 0x7FFFFFFF))
            most = tl.maximum(most, tl.where(inner, bits, 0))
        upper_count = tl.sum(counts)
        upper_mass = tl.sum(masses)
        if (count + upper_count < top_k) & (mass + upper_mass < limit):
            high = middle
            between -= upper_count
            count += upper_count
            mass += upper_mass
        else:
            low = middle
            between = upper_count
        # What no token lies in need not be searched: few distinct weights end quickly.
        high = tl.minimum(high, tl.max(most))
        low = tl.maximum(low, tl.min(least) - 1)
    return low, high, between, count, mass


@triton.jit
def collect_row(
    row_ptr,
    list_ptr,
    best,
    rate,
    low,
    high,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write the bits of the tokens between ``low`` and ``high`` to ``list_ptr``."""
    filled = 0
    for chunk in tl.range(CHUNKS, num_stages=3):
        _, weights = load_tile(row_ptr, chunk, best, rate, VOCAB, CHUNK)
        bits = weights.to(tl.int32, bitcast=True)
        inner = (bits > low) & (bits <= high)
        places = filled + tl.cumsum(inner.to(tl.int32), 0) - 1
        tl.store(list_ptr + places, bits.to(tl.int64), mask=inner)
        filled += tl.sum(inner.to(tl.int32))
    tl.debug_barrier()  # other threads read it


@triton.jit
def weigh_chunks(
    row_ptr,
    best,
    rate,
    edge,
    ties,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of every chunk [COLUMNS]: the mass kept, float64, and the tokens at the edge before it."""
    column = tl.arange(0, COLUMNS)
    masses = tl.zeros([COLUMNS], tl.float64)
    before = tl.zeros([COLUMNS], tl.int32)
    seen = 0
    for chunk in tl.range(CHUNKS, num_stages=3):
        _, weights = load_tile(row_ptr, chunk, best, rate, VOCAB, CHUNK)
        before = tl.where(column == chunk, seen, before)
        kept, seen = kept_weights(weights, edge, ties, seen)
        masses = tl.where(column == chunk, tl.sum(kept).to(tl.float64), masses)
    return masses, before


@triton.jit
def choose_from_list(
    listed_ptr,
    starts_ptr,
    counts,
    size,
    low,
    high,
    top_k,
    limit,
    random,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    LIST: tl.constexpr,
):
    """The token of a row whose ``size`` candidates are all listed, ``counts`` [COLUMNS] of each
    chunk; ``starts_ptr`` has room for as many numbers."""
    column = tl.arange(0, COLUMNS)
    tl.store(starts_ptr + column, tl.cumsum(counts, 0) - counts, mask=column < CHUNKS)
    tl.debug_barrier()  # other threads read it
    slot = tl.arange(0, LIST)
    chunk = slot * 0  # the last that starts at or before the slot, bit by bit
    start = chunk
    for bit in tl.static_range(1, 20):
        if COLUMNS >> bit > 0:
            later = chunk + (COLUMNS >> bit)
            found = tl.load(
                starts_ptr + later, mask=later < CHUNKS, other=LIST, cache_modifier=".cg"
            )
            start = tl.where(found <= slot, found, start)
            chunk = tl.where(found <= slot, later, chunk)
    source = listed_ptr + chunk * SLOTS + slot - start
    listed = tl.load(source, mask=slot < size, other=0, cache_modifier=".cg")
    bits = (listed & 0x7FFFFFFF).to(tl.int32)
    ids = (listed >> 32).to(tl.int32)
    edge, ties = find_edge(bits, low, high, 0, 0.0, top_k, limit)
    kept, _ = kept_weights(bits.to(tl.float32, bitcast=True), edge, ties, 0)
    return pick(ids, kept, random * tl.sum(kept))


@triton.jit
def search_row(
    row_ptr,
    listed_ptr,
    best,
    rate,
    low,
    high,
    between,
    count,
    mass,
    top_k,
    limit,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LIST: tl.constexpr,
):
    """``find_edge`` for a row whose candidates are too many to be listed."""
    low, high, between, count, mass = narrow_row(
        row_ptr, best, rate, low, high, between, count, mass, top_k, limit,
        VOCAB, CHUNK, CHUNKS, LIST,
    )  # fmt: skip
    size = tl.where(between <= LIST, between, 0)  # more: all of them are ties at ``high``
    if size > 0:
        collect_row(row_ptr, listed_ptr, best, rate, low, high, VOCAB, CHUNK, CHUNKS)
    slot = tl.arange(0, LIST)
    bits = tl.load(listed_ptr + slot, mask=slot < size, other=0, cache_modifier=".cg")
    return find_edge(bits.to(tl.int32), low, high, count, mass, top_k, limit)


@triton.jit
def choose_from_row(
    row_ptr,
    best,
    rate,
    edge,
    ties,
    masses,
    before,
    random,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The token, given what each chunk [COLUMNS] keeps and the tokens at the edge before it."""
    column = tl.arange(0, COLUMNS)
    target = random * tl.sum(masses)
    chunk = pick(column, masses, target)
    target -= tl.sum(tl.where(column < chunk, masses, 0.0))
    seen = tl.sum(tl.where(column == chunk, before, 0))
    ids, weights = load_tile(row_ptr, chunk, best, rate, VOCAB, CHUNK)
    kept, _ = kept_weights(weights, edge, ties, seen)
    return pick(ids, kept, target)
