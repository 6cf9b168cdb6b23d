"""Softmax statistics of the vocabulary, tile by tile, with the target left out.

    z_v = cap · tanh(s h·W_v / cap) / T,    or  s h·W_v / T  without soft-capping
    d = lse_{v≠t} z_v − z_t,    log p_t = −softplus(d),    H = H_b(σ(d)) + σ(d) H_{v≠t}

Leaving the target out keeps log-prob and entropy accurate *relatively*: with log p_t = z_t − lse all digits are gone at
−log p = 1e-8, here seven remain. Tile statistics are merged in float64; they are small.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.collect.head.gemm import TILE, TOKENS, product_nt

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


def without_target(
    logits: Float[Tensor, "token tile"], targets: Int[Tensor, " token"], start: int
) -> tuple[Int[Tensor, " found"], Float[Tensor, " found"]]:
    """Takes the targets out of a tile, in place; gives the rows whose target it held, and their logits."""
    local = targets - start
    rows = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    columns = local[rows]
    found = logits[rows, columns]
    logits[rows, columns] = OUT
    return rows, found


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
    tile_lse, tile_mean = tile_lse.double(), tile_mean.double()
    lse = torch.logsumexp(tile_lse, dim=0)
    rest = (lse - (torch.exp(tile_lse - lse) * tile_mean).sum(0)).clamp_min(0.0)
    gap = lse - target_logits.double()
    others = torch.sigmoid(gap)
    certain, doubtful = torch.nn.functional.softplus(gap), torch.nn.functional.softplus(-gap)
    entropies = certain * torch.sigmoid(-gap) + doubtful * others + others * rest
    return TokenStatistics(-certain, entropies, others, target_logits.double() + certain)


def scan(
    hidden: Float[Tensor, "token hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " token"],
    readout: Readout,
    *,
    onednn: bool | None = None,
) -> tuple[TokenStatistics, Float[Tensor, "tile token"]]:
    """Statistics of every token and the lse of every tile; one matrix product, nothing of size [token, vocab]."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count = -(-vocab // TILE)
    tile_lse, tile_mean = (torch.empty(count, tokens, dtype=wide, device=hidden.device) for _ in range(2))
    target_logits = torch.empty(tokens, dtype=wide, device=hidden.device)
    rows = folded(hidden, readout)
    for index, columns in enumerate(spans(vocab, TILE)):
        for block in spans(tokens, TOKENS):
            logits = tile_logits(rows[block], weight[columns], readout, onednn)
            found, values = without_target(logits, targets[block], columns.start)
            target_logits[block][found] = values
            tile = softmax_tile(logits)
            tile_lse[index, block] = tile.lse
            tile_mean[index, block] = torch.linalg.vecdot(tile.probs, tile.logits)
    return statistics(target_logits, tile_lse, tile_mean), tile_lse
