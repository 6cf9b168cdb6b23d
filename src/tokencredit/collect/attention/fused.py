"""Statistics of attention rows on a GPU by the kernels of `attention_kernels`, where a mask is made of intervals.

`fits` says whether the kernels can replace the blocks of `attention_rows`; everything else takes the blocks.
"""

import os
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.collect.attention.parts import AttentionRows

# The interpreter computes with numpy, which has no bfloat16: it upcasts before the product.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 1 << 26  # entries of the mask that are read at a time
WIDEST = 256  # head dimension


class Tile(NamedTuple):
    """Sizes of a program: rows and keys at a time, warps, stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Intervals(NamedTuple):
    """Row i sees the keys low[i] … high[i] − 1; [batch, row], int32."""

    low: Int[Tensor, "batch row"]
    high: Int[Tensor, "batch row"]


def available() -> bool:
    """Whether Triton can be imported and torch was built for a GPU that it compiles for."""
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return False
    try:
        import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def fits(attention: AttentionRows) -> bool:
    """Whether the kernels can compute these rows: on CUDA, no finite bias, a head dimension of at most 256."""
    on_device = attention.query.is_cuda or INTERPRETED
    narrow = attention.query.shape[-1] <= WIDEST and attention.keys > 0
    return on_device and attention.visibility.bias is None and narrow and available()


def fused_intervals(attention: AttentionRows) -> Intervals | None:
    """The intervals that the kernels are to use; None where the blocks of `attention.rows` must do the work."""
    return intervals(attention) if fits(attention) else None


def tile_of(width: int, dtype: torch.dtype) -> Tile:
    """The tile of a head dimension: inputs of 4 bytes take twice the shared memory, so they get smaller tiles."""
    wide = dtype.itemsize > 2
    if width <= 64:
        return Tile(64, 64, 4, 2) if wide else Tile(128, 64, 4, 3)
    if width <= 128:
        return Tile(64, 32, 4, 2) if wide else Tile(128, 64, 8, 2)
    return Tile(32, 32, 4, 1) if wide else Tile(64, 64, 4, 2)


def intervals(attention: AttentionRows) -> Intervals | None:
    """The interval of keys that each row sees; None where a row's keys are not one interval.

    A mask is read a few rows at a time, and one number comes back from the device.
    """
    first, stop = attention.span
    batch, keys, mask = len(attention.query), attention.keys, attention.visibility.mask
    own = torch.arange(first, stop, device=attention.query.device) + attention.offset
    if mask is None:
        high = (own + 1).clamp(0, keys).to(torch.int32).expand(batch, -1).contiguous()
        return Intervals(torch.zeros_like(high), high)
    lows, highs, whole = [], [], []
    step = max(1, CHUNK // max(1, batch * keys))
    for start in range(first, stop, step):
        plane = mask(slice(0, batch), slice(start, min(start + step, stop)))
        plane = plane.expand(batch, *plane.shape[-2:])
        count, low = plane.sum(-1), plane.to(torch.uint8).argmax(-1)
        last = keys - 1 - plane.flip(-1).to(torch.uint8).argmax(-1)
        whole.append(((last - low + 1 == count) | (count == 0)).all())
        lows.append(torch.where(count > 0, low, keys))
        highs.append(torch.where(count > 0, low + count, 0))
    if whole and not bool(torch.stack(whole).all()):
        return None
    return Intervals(*(torch.cat(part, 1).to(torch.int32).contiguous() for part in (lows, highs)))


class FusedRows(NamedTuple):
    """Of every row, [batch, row]: entropy in nats behind the dropped keys, mass on the first key, mass dropped."""

    entropies: Float[Tensor, "batch row"]
    sink_mass: Float[Tensor, "batch row"]
    dropped: Float[Tensor, "batch row"]


class FusedHeads(NamedTuple):
    """Of every head's row: lse and entropy in nats, mean distance, mean distance capped at `near`."""

    log_sums: Float[Tensor, "batch heads row"]
    entropies: Float[Tensor, "batch heads row"]
    reach: Float[Tensor, "batch heads row"] | None
    distances: Float[Tensor, "batch heads row"] | None


class Call(NamedTuple):
    """What every launch is given: tensors with contiguous rows, strides, sizes and compile-time constants."""

    query: Tensor
    key: Tensor
    seen: Intervals
    first: int
    rows: int
    scale: float
    constants: dict[str, Any]
    tile: Tile

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.query.stride()[:3], *self.key.stride()[:3])

    @property
    def launch(self) -> dict[str, Any]:
        return self.constants | {"num_warps": self.tile.warps, "num_stages": self.tile.stages}

    def grid(self, per_program: int, second: int) -> tuple[int, int]:
        return (max(1, -(-self.rows // per_program)), second)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.rows, dtype=torch.float32, device=self.query.device)


def prepare(attention: AttentionRows, seen: Intervals) -> Call:
    """Everything that the three kernels share."""
    query, key, (first, stop) = attention.query, attention.key.to(attention.query.dtype), attention.span
    width = query.shape[-1]
    tile = tile_of(width, query.dtype)
    constants = constants_of(attention.share, width, query.dtype, attention.softcap, tile)
    return Call(_contiguous(query), _contiguous(key), seen, first, stop - first, attention.scale, constants, tile)


def constants_of(share: int, width: int, dtype: torch.dtype, softcap: float | None, tile: Tile) -> dict[str, Any]:
    """Compile-time constants of a kernel."""
    return {
        "SHARE": share,
        "WIDTH": width,
        "DIM": max(16, 1 << (width - 1).bit_length()),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CAP": float(softcap or 0.0),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # 16-bit inputs take neither
        "UPCAST": INTERPRETED,
    }


def fused_heads(call: Call, *, near: int | None = None) -> FusedHeads:
    """Log-sum-exp and entropy of every head's rows; with `near` also how far the head looks back."""
    from tokencredit.collect.attention.kernels import head_moments

    batch, heads = call.query.shape[:2]
    shape = (batch, heads)
    log_sums, entropies = call.empty(*shape), call.empty(*shape)
    reach, distances = (call.empty(*shape), call.empty(*shape)) if near is not None else (entropies, entropies)
    offset = call.key.shape[2] - call.query.shape[2]
    head_moments[call.grid(call.tile.rows, batch * heads)](
        call.query, call.key, *call.seen, log_sums, entropies, reach, distances, *call.strides,
        call.first, call.rows, call.key.shape[2], offset, heads, call.scale, near or 0,
        DISTANCES=near is not None, **call.launch,
    )  # fmt: skip
    return FusedHeads(log_sums, entropies, *((reach, distances) if near is not None else (None, None)))


def fused_mean_rows(call: Call, log_sums: Float[Tensor, "batch heads row"], drop: int = 0) -> FusedRows:
    """Statistics of the row averaged over the heads."""
    from tokencredit.collect.attention.kernels import mean_rows

    batch, heads = call.query.shape[:2]
    entropies, sinks, dropped = call.empty(batch), call.empty(batch), call.empty(batch)
    mean_rows[call.grid(call.tile.rows, batch)](
        call.query, call.key, *call.seen, log_sums, entropies, sinks, dropped, *call.strides,
        call.first, call.rows, call.key.shape[2], heads, call.scale, drop, **call.launch,
    )  # fmt: skip
    if drop:  # of p/R over what is left: H = (−Σ p ln p)/R + ln R
        rest = (1.0 - dropped).clamp_min(torch.finfo(torch.float32).tiny)
        entropies = entropies / rest + rest.log()
    return FusedRows(entropies, sinks, dropped)


def fused_influences(
    call: Call, log_sums: Float[Tensor, "batch heads row"], near: int, far: int
) -> Float[Tensor, "batch heads row"]:
    """Σ_t p_{t,s} over the rows t between `near` and `far` places after each row's own key s."""
    from tokencredit.collect.attention.kernels import head_influences

    batch, heads = call.query.shape[:2]
    influences = call.empty(batch, heads)
    offset = call.key.shape[2] - call.query.shape[2]
    head_influences[call.grid(call.tile.columns, batch * heads)](
        call.query, call.key, *call.seen, log_sums, influences, *call.strides,
        call.first, call.rows, call.key.shape[2], offset, heads, call.scale, near, far, **call.launch,
    )  # fmt: skip
    return influences


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
