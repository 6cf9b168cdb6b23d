"""Triton kernels for statistics of attention rows: queries against keys, no values, nothing of size T × T.

Every row sees an interval of keys, [low, high): causal masks, sliding windows, chunks, padding on either side and
packed sequences are all of that form. Scores and statistics are float32 whatever the inputs are; float32 inputs are
multiplied in IEEE float32, not in TF32. Pointers are advanced by 64-bit offsets.

    pass 1, per head:   lse_t, H_t = lse_t − Σ_s p s,   Σ_s p (t − s),   Σ_s p min(t − s, near)
    pass 2, all heads:  ā_t = (1/H) Σ_h exp(s_h − lse_h),   −Σ ā ln ā,   Σ ā over the first keys that a row sees
    pass 3, per head:   Σ_t p_{t,s} over the rows t that are `near` to `far` places after s

The pow-2 padded head dimension costs products with zeros for widths such as 80, 96 and 192.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

EMPTY = tl.constexpr(-1.0e38)  # the maximum of a row that has seen nothing


@triton.jit
def _load_rows(base, rows, row_stride, dims, count, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, DIM] of a matrix with contiguous rows; 0 outside."""
    places = base + rows[:, None].to(tl.int64) * row_stride + dims[None, :]
    return tl.load(places, mask=(rows[:, None] < count) & (dims[None, :] < WIDTH), other=0.0)


@triton.jit
def _scores(left, right, scale, CAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scaled, soft-capped scores in float32; the interpreter has no bfloat16 and computes in float32."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
    if CAP > 0:
        scores = CAP * (2.0 * tl.sigmoid(2.0 * scores / CAP) - 1.0)
    return scores


@triton.jit
def head_moments(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    query, key, lows, highs, log_sums, entropies, reaches, distances,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    first, count, keys, offset, heads, scale, near,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAP: tl.constexpr, DISTANCES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one head, by an online softmax. Outputs are [batch, heads, count]."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, head = pair // heads, pair % heads
    local = block * ROWS + tl.arange(0, ROWS)
    inside = local < count
    low = tl.load(lows + sequence * count + local, mask=inside, other=keys)
    high = tl.load(highs + sequence * count + local, mask=inside, other=0)
    dims = tl.arange(0, DIM)
    left = _load_rows(
        query + sequence * query_batch + head * query_head, first + local, query_row, dims, first + count, WIDTH
    )
    own_key = first + local + offset
    base = key + sequence * key_batch + (head // SHARE) * key_head
    top = tl.full((ROWS,), EMPTY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    reach = tl.zeros((ROWS,), tl.float32)
    distance = tl.zeros((ROWS,), tl.float32)
    begin = (tl.min(low, 0) // COLUMNS) * COLUMNS
    for start in range(begin, tl.max(high, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        right = _load_rows(base, column, key_row, dims, keys, WIDTH)
        scores = _scores(left, right, scale, CAP, PRECISION, UPCAST)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        new_top = tl.maximum(top, tl.max(tl.where(seen, scores, EMPTY), 1))
        shift = tl.where(new_top == EMPTY, 0.0, new_top)
        decay = tl.exp(top - shift)
        centred = tl.where(seen, scores - shift[:, None], 0.0)
        mass = tl.where(seen, tl.exp(centred), 0.0)
        slide = tl.where(top == EMPTY, 0.0, top - shift)
        moment = decay * (moment + slide * total) + tl.sum(mass * centred, 1)
        total = decay * total + tl.sum(mass, 1)
        if DISTANCES:
            back = tl.maximum(own_key[:, None] - column[None, :], 0).to(tl.float32)
            reach = decay * reach + tl.sum(mass * back, 1)
            distance = decay * distance + tl.sum(mass * tl.minimum(back, near), 1)
        top = new_top
    some = total > 0
    positive = tl.where(some, total, 1.0)
    target = pair * count + local
    tl.store(log_sums + target, top + tl.log(positive), mask=inside)
    tl.store(entropies + target, tl.where(some, tl.log(positive) - moment / positive, 0.0), mask=inside)
    if DISTANCES:
        tl.store(reaches + target, reach / positive, mask=inside)
        tl.store(distances + target, distance / positive, mask=inside)


@triton.jit
def mean_rows(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    query, key, lows, highs, log_sums, entropies, sinks, dropped,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    first, count, keys, heads, scale, drop,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one sequence, all heads. Outputs are [batch, count].

    `entropies` is −Σ ā ln ā over the keys behind the first `drop` that the row sees, `dropped` the mass on those, and
    `sinks` the mass on the very first one.
    """
    block, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    local = block * ROWS + tl.arange(0, ROWS)
    inside = local < count
    low = tl.load(lows + sequence * count + local, mask=inside, other=keys)
    high = tl.load(highs + sequence * count + local, mask=inside, other=0)
    dims = tl.arange(0, DIM)
    entropy = tl.zeros((ROWS,), tl.float32)
    sink = tl.zeros((ROWS,), tl.float32)
    cut = tl.zeros((ROWS,), tl.float32)
    begin = (tl.min(low, 0) // COLUMNS) * COLUMNS
    for start in range(begin, tl.max(high, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        mean = tl.zeros((ROWS, COLUMNS), tl.float32)
        for head in range(heads):
            near_query = query + sequence * query_batch + tl.cast(head, tl.int64) * query_head
            near_key = key + sequence * key_batch + tl.cast(head // SHARE, tl.int64) * key_head
            left = _load_rows(near_query, first + local, query_row, dims, first + count, WIDTH)
            right = _load_rows(near_key, column, key_row, dims, keys, WIDTH)
            log_sum = tl.load(log_sums + (sequence * heads + head) * count + local, mask=inside, other=0.0)
            scores = _scores(left, right, scale, CAP, PRECISION, UPCAST)
            mean += tl.where(seen, tl.exp(scores - log_sum[:, None]), 0.0)
        mean = mean / heads
        front = column[None, :] < low[:, None] + drop
        sink += tl.sum(tl.where(column[None, :] == low[:, None], mean, 0.0), 1)
        cut += tl.sum(tl.where(front, mean, 0.0), 1)
        kept = tl.where(front, 0.0, mean)
        entropy -= tl.sum(kept * tl.log(tl.maximum(kept, 1.2e-38)), 1)
    target = sequence * count + local
    tl.store(entropies + target, entropy, mask=inside)
    tl.store(sinks + target, sink, mask=inside)
    tl.store(dropped + target, cut, mask=inside)


@triton.jit
def head_influences(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    query, key, lows, highs, log_sums, influences,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    first, count, keys, offset, heads, scale, near, far,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS keys of one head, and the rows between `near` and `far` places after them.

    Keys are those of the rows first … first + count − 1 themselves; the output is [batch, heads, count].
    """
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, head = pair // heads, pair % heads
    own = block * COLUMNS + tl.arange(0, COLUMNS)
    column = first + own + offset
    dims = tl.arange(0, DIM)
    right = _load_rows(key + sequence * key_batch + (head // SHARE) * key_head, column, key_row, dims, keys, WIDTH)
    base = query + sequence * query_batch + head * query_head
    looked = tl.zeros((COLUMNS,), tl.float32)
    last = tl.minimum(count, (block + 1) * COLUMNS + far)
    for start in range(block * COLUMNS + near, last, ROWS):
        local = start + tl.arange(0, ROWS)
        inside = local < count
        low = tl.load(lows + sequence * count + local, mask=inside, other=keys)
        high = tl.load(highs + sequence * count + local, mask=inside, other=0)
        log_sum = tl.load(log_sums + pair * count + local, mask=inside, other=0.0)
        left = _load_rows(base, first + local, query_row, dims, first + count, WIDTH)
        scores = _scores(left, right, scale, CAP, PRECISION, UPCAST)
        back = local[:, None] - own[None, :]
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None]) & (back >= near) & (back <= far)
        looked += tl.sum(tl.where(seen, tl.exp(scores - log_sum[:, None]), 0.0), 0)
    tl.store(influences + pair * count + own, looked, mask=own < count)
