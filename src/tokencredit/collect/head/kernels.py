"""Triton kernels that read a tile of logits once: its softmax statistics, and its gradient.

One program handles one row (token) of the tile. Logits are float32 and not yet soft-capped; the target is left out of
the statistics, as in `head.tiles`.

    fold:      ℓ = lse_{v≠t} z_v,   m = Σ_{v≠t} e^{z_v − ℓ} z_v,   z_t
    gradient:  e^{z_v − lse} (c − b z_v) for v ≠ t, and the given value at t; times the slope of the soft-cap
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

EMPTY = tl.constexpr(-1.0e38)  # the maximum of a row that has seen nothing


@triton.jit
def _capped(raw, cap, scale, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits from raw products, and tanh of the soft-cap (0 without one)."""
    tanh = tl.zeros_like(raw)
    if CAPPED:
        tanh = 2.0 * tl.sigmoid(2.0 * raw / cap) - 1.0
        raw = tanh * scale
    return raw, tanh


@triton.jit
def fold_tile(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    logits, stride, targets, lse, mean, target_logits, start, columns, cap, scale,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of one row of a tile whose first entry is `start`; `target_logits` only where it holds the target."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    local = tl.load(targets + row) - start
    top = EMPTY
    total = 0.0
    moment = 0.0
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        kept = (place < columns) & (place != local)
        z, _ = _capped(tl.load(base + place, mask=kept, other=0.0), cap, scale, CAPPED)
        new_top = tl.maximum(top, tl.max(tl.where(kept, z, EMPTY), 0))
        shift = tl.where(new_top == EMPTY, 0.0, new_top)
        decay = tl.exp(top - shift)
        mass = tl.where(kept, tl.exp(z - shift), 0.0)
        moment = decay * moment + tl.sum(mass * tl.where(kept, z, 0.0), 0)
        total = decay * total + tl.sum(mass, 0)
        top = new_top
    some = total > 0
    positive = tl.where(some, total, 1.0)
    tl.store(lse + row, tl.where(some, top + tl.log(positive), -1.0e30))
    tl.store(mean + row, tl.where(some, moment / positive, -1.0e30))
    if (local >= 0) & (local < columns):
        z, _ = _capped(tl.load(base + local), cap, scale, CAPPED)
        tl.store(target_logits + row, z)


@triton.jit
def tile_gradient(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    logits, stride, targets, lse, constant, on_entropy, at_target, out, out_stride, start, columns, cap, scale, inverse,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of one row with respect to the raw products, in the type of `out`.

    `scale` is cap/T and `inverse` 1/T with a soft-cap; without one T is folded into the products.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    raw = tl.load(logits + row * stride + place, mask=inside, other=0.0)
    z, tanh = _capped(raw, cap, scale, CAPPED)
    weight = tl.zeros_like(z) + tl.load(constant + row)
    if ENTROPY:
        weight -= tl.load(on_entropy + row) * z
    local = tl.load(targets + row) - start
    # The target may be far above the lse of the others: its exponential is not wanted and could overflow.
    exponent = tl.where(place == local, 0.0, z - tl.load(lse + row))
    gradient = tl.where(place == local, tl.load(at_target + row), tl.exp(exponent) * weight)
    if CAPPED:
        gradient = gradient * (1.0 - tanh * tanh) * inverse
    tl.store(out + row * out_stride + place, gradient.to(out.dtype.element_ty), mask=inside)
