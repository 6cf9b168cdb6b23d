"""Softmax statistics of the vocabulary, tile by tile, with the target left out.

    z_v = cap · tanh(s h·W_v / cap) / T,    or  s h·W_v / T  without soft-capping
    d = lse_{v≠t} z_v − z_t,    log p_t = −softplus(d),    H = H_b(σ(d)) + σ(d) H_{v≠t}

Leaving the target out keeps log-prob and entropy accurate *relatively*: with log p_t = z_t − lse all digits are gone at
−log p = 1e-8, here seven remain. Tile statistics are merged in float64; they are small. No step waits for the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tokencredit.collect.head.fused as fused  # the package gives its names on request, so not `from … import`
from tokencredit.collect.head.gemm import Tiling, exact, product_nt, tiling

OUT = -1e30  # the score of a vocabulary entry that takes no part; finite, so that 0 · OUT is 0


class Readout(NamedTuple):
    """How hidden states become logits, besides the matrix: temperature T, scale s, soft-cap."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @property
    def fold(self) -> float:
        """What is folded into the hidden states: a factor there costs nothing."""
        return self.scale if self.softcap is not None else self.scale / self.temperature


PLAIN = Readout()


class HeadInputs(NamedTuple):
    """Hidden states, the output matrix that reads them, and the tokens to score. `onednn`: None where it works."""

    hidden: Float[Tensor, "token hidden"]
    weight: Float[Tensor, "vocab hidden"]
    targets: Int[Tensor, " token"]
    readout: Readout = PLAIN
    onednn: bool | None = None

    @property
    def wide(self) -> torch.dtype:
        """The type of logits and sums: float32, or float64 for float64 states."""
        return wide_dtype(self.hidden)

    @property
    def tiling(self) -> Tiling:
        """Sizes of the tiles."""
        return tiling(self.hidden)

    def at(self, rows: slice | Tensor) -> "HeadInputs":
        """The inputs of some tokens."""
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows])

    def folded(self) -> Float[Tensor, "token hidden"]:
        """Hidden states times the factor of the readout."""
        return folded(self.hidden, self.readout)

    def columns(self) -> list[slice]:
        """The vocabulary in tiles."""
        return list(spans(self.weight.shape[0], self.tiling.vocab))

    def blocks(self) -> list[slice]:
        """The tokens in blocks."""
        return list(spans(self.hidden.shape[0], self.tiling.tokens))


class TokenStatistics(NamedTuple):
    """What the vocabulary says of each token, in float64: log p_t, H, the mass and lse of the others, lse of all."""

    logprobs: Float[Tensor, " token"]
    entropies: Float[Tensor, " token"]
    others: Float[Tensor, " token"]  # 1 − p_t
    lse: Float[Tensor, " token"]


class Tile(NamedTuple):
    """Softmax of one tile of the vocabulary, the target left out."""

    logits: Float[Tensor, "token tile"]
    probs: Float[Tensor, "token tile"]
    lse: Float[Tensor, " token"]


class Place(NamedTuple):
    """Where the targets are in a tile: whether it holds them, a column inside the tile, and the logit there."""

    inside: Bool[Tensor, " token"]
    column: Int[Tensor, "token 1"]
    logits: Float[Tensor, " token"]


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def folded(hidden: Float[Tensor, "token hidden"], readout: Readout) -> Float[Tensor, "token hidden"]:
    """Hidden states times the factor of the readout."""
    return hidden if readout.fold == 1.0 else hidden * readout.fold


def spans(length: int, step: int) -> Iterator[slice]:
    """[0, step), [step, 2 step), … up to `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def tile_logits(
    rows: Float[Tensor, "token hidden"], weight: Float[Tensor, "tile hidden"], readout: Readout, onednn: bool | None
) -> Float[Tensor, "token tile"]:
    """Logits of folded rows, soft-capped."""
    logits = product_nt(rows, weight, onednn=onednn)
    if readout.softcap is not None:
        logits.div_(readout.softcap).tanh_().mul_(readout.softcap / readout.temperature)
    return logits


def slope(logits: Tensor, readout: Readout) -> Tensor | None:
    """dz/dx · T of the soft-cap, 1 − tanh², over the temperature; None without a cap."""
    if readout.softcap is None:
        return None
    tanh = (logits * (readout.temperature / readout.softcap)).clamp_(-1.0, 1.0)  # OUT is no tanh
    return (1.0 - tanh.square()) / readout.temperature


def take_targets(logits: Float[Tensor, "token tile"], targets: Int[Tensor, " token"], start: int) -> Place:
    """Take the targets out of a tile that starts at entry `start`, in place."""
    local = targets - start
    inside = (local >= 0) & (local < logits.shape[1])
    column = local.clamp(0, logits.shape[1] - 1)[:, None]
    place = Place(inside, column, logits.gather(1, column)[:, 0])
    put_targets(logits, place, torch.full_like(place.logits, OUT))
    return place


def put_targets(tile: Float[Tensor, "token tile"], place: Place, values: Float[Tensor, " token"]) -> None:
    """Write one value per token at its target, in place, where the tile holds the target."""
    kept = tile.gather(1, place.column)
    tile.scatter_(1, place.column, torch.where(place.inside[:, None], values[:, None], kept))


def softmax_tile(logits: Float[Tensor, "token tile"]) -> Tile:
    """One transcendental pass: the tile's lse is its greatest logit minus the log of its greatest probability."""
    probs = torch.softmax(logits, dim=-1)
    return Tile(logits, probs, logits.amax(-1) - probs.amax(-1).log())


def statistics(
    target_logits: Float[Tensor, " token"],
    tile_lse: Float[Tensor, "tile token"],
    tile_mean: Float[Tensor, "tile token"],
) -> TokenStatistics:
    """Merges the tiles: lse and mean logit of each, targets left out."""
    tile_lse, tile_mean = exact(tile_lse), exact(tile_mean)
    lse = torch.logsumexp(tile_lse, dim=0)
    rest = (lse - (torch.exp(tile_lse - lse) * tile_mean).sum(0)).clamp_min(0.0)
    gap = lse - exact(target_logits)
    others = torch.sigmoid(gap)
    certain, doubtful = torch.nn.functional.softplus(gap), torch.nn.functional.softplus(-gap)
    entropies = certain * torch.sigmoid(-gap) + doubtful * others + others * rest
    return TokenStatistics(-certain, entropies, others, exact(target_logits) + certain)


def scan(inputs: HeadInputs) -> TokenStatistics:
    """Statistics of every token; one matrix product, nothing of size [token, vocab]."""
    tokens, columns = inputs.hidden.shape[0], inputs.columns()
    device = inputs.hidden.device
    tile_lse, tile_mean = (torch.empty(len(columns), tokens, dtype=inputs.wide, device=device) for _ in range(2))
    target_logits = torch.empty(tokens, dtype=inputs.wide, device=device)
    rows = inputs.folded()
    for index, span in enumerate(columns):
        for block in inputs.blocks():
            out = (tile_lse[index, block], tile_mean[index, block], target_logits[block])
            if fused.fits(inputs.hidden):
                raw = product_nt(rows[block], inputs.weight[span], onednn=inputs.onednn)
                fused.fold(raw, inputs.targets[block], span.start, inputs.readout, out)
                continue
            logits = tile_logits(rows[block], inputs.weight[span], inputs.readout, inputs.onednn)
            place = take_targets(logits, inputs.targets[block], span.start)
            tile = softmax_tile(logits)
            out[0].copy_(tile.lse)
            out[1].copy_(torch.linalg.vecdot(tile.probs, tile.logits))
            out[2].copy_(torch.where(place.inside, place.logits, out[2]))
    return statistics(target_logits, tile_lse, tile_mean)
