"""Other published rules that read credit off the attention: distances, influence, attention of the answer."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, response_lengths, row_quantile, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import lowest_or_highest
from tokencredit.methods.spec import Limit, MethodSpec, Rows


def attention_rhythm(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    credit: Literal["local", "global", "coupled"] = "coupled",
    share: float = 0.4,
    gain: float = 1.5,
    alpha: float = 0.5,
    reach: int = 3,
) -> Float[Tensor, "batch response"]:
    """Attention Illuminates: amplify where local attention jumps, or what later tokens look back at.

        local:   Â′ = gain · Â on the top share of Δ_t = |WAAD_t − WAAD_{t+1}|
        global:  Â′ = gain · Â on the top share of FAI_t
        coupled: as global, but an anchor that is locally dominated keeps 1 + (1 − α)(gain − 1) and hands
                 α (gain − 1) to the token that introduced it

    WAAD is the windowed mean distance that local heads look back, FAI the mean attention that a token gets from the
    tokens 10 to 50 places later (`batch.attention_distances`, `batch.attention_influences`); Δ of the last token is 0.
    Dominated: WAAD_t below its median in the response and a Δ above its median among the `reach` tokens before t; the
    introducing token is the one of them with the greatest Δ. Only Â ≥ 0. gain = 1 is the identity.

    Paper: Attention Illuminates LLM Reasoning (arXiv:2510.13554): share, gain, reach. α, both medians and the choice of
    the introducing token are ours; the paper's values are not known to us.
    """
    mask = batch.response_mask
    n = response_lengths(mask)
    real = torch.arange(mask.shape[1], device=mask.device) < n
    distances = compact(chosen(batch.require("attention_distances"), mask), mask)
    jumps = _find_jumps(distances, real)
    influences = compact(chosen(batch.require("attention_influences"), mask), mask)
    ranked = jumps if credit == "local" else influences
    bonus = torch.where(_find_top(ranked, real, share), gain - 1.0, 0.0)
    if credit == "coupled":
        bonus = _hand_back(bonus, distances, jumps, real, alpha, reach)
    a = chosen(advantages, mask)
    return chosen(torch.where(a < 0, a, a * (1.0 + spread(bonus, mask))), mask)


def answer_attention(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, floor: float = 0.5
) -> Float[Tensor, "batch response"]:
    """ATPO: credit reasoning tokens by how much the answer attends to them.

        Â′_t = Â_t · max(floor, σ(z(ln m_t)))        Â′_t = Â_t on answer tokens

    m_t > 0 is the mean attention that the answer pays to token t in the last layer (`batch.importances`, from
    `collect.attention.answer` or a collector of your own); m_t ≤ 0 marks answer tokens. z standardises over the reasoning tokens
    of the response. floor = 1 is the identity.

    Source: project notes of ATPO, abandoned by their authors: attention is no causal contribution, and without the
    floor length and accuracy collapse. That the floor is a maximum is ours.
    """
    mask = batch.response_mask
    importances = chosen(batch.require("importances"), mask)
    reasoning = mask & (importances > 0)
    logs = torch.where(reasoning, torch.where(reasoning, importances, 1.0).log(), 0.0)
    count = reasoning.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(reasoning, logs - logs.sum(1, keepdim=True) / count, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    z = torch.where(std > 1e-12, centred / torch.where(std > 1e-12, std, 1.0), 0.0)
    weights = torch.where(reasoning, torch.sigmoid(z).clamp_min(floor), 1.0)
    return chosen(chosen(advantages, mask) * weights, mask)


def _find_jumps(
    distances: Float[Tensor, "batch response"], real: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """|x_t − x_{t+1}| of compacted rows; 0 on the last token."""
    following = torch.cat((distances[:, 1:], distances[:, -1:]), dim=1)
    has_next = torch.cat((real[:, 1:], torch.zeros_like(real[:, :1])), dim=1)
    return torch.where(has_next, (distances - following).abs(), 0.0)


def _find_top(
    x: Float[Tensor, "batch response"], real: Bool[Tensor, "batch response"], share: float
) -> Bool[Tensor, "batch response"]:
    """The highest `share` of each row; of equal values the earlier ones."""
    return lowest_or_highest(-x, real, share, "low")


def _hand_back(
    bonus: Float[Tensor, "batch response"],
    distances: Float[Tensor, "batch response"],
    jumps: Float[Tensor, "batch response"],
    real: Bool[Tensor, "batch response"],
    alpha: float,
    reach: int,
) -> Float[Tensor, "batch response"]:
    """Dominated anchors hand α of their bonus to the token among the `reach` before them with the greatest jump."""
    reach = min(reach, jumps.shape[1])
    if reach == 0:
        return bonus
    padded = torch.nn.functional.pad(jumps, (reach, 0), value=-1.0)
    before = padded.unfold(1, reach, 1)[:, : jumps.shape[1]]  # [batch, response, reach], oldest first
    greatest, offset = before.max(dim=2)
    dominated = (bonus > 0) & (distances < row_quantile(distances, real, 0.5))
    dominated &= greatest > row_quantile(jumps, real, 0.5)
    source = torch.arange(jumps.shape[1], device=jumps.device) - reach + offset
    handed = torch.where(dominated, alpha * bonus, 0.0)
    return (bonus - handed).scatter_add(1, source.clamp_min(0), handed)


ROWS = Rows(
    transforms={
        "attention_rhythm": MethodSpec(
            fn=attention_rhythm,
            paper="arXiv:2510.13554",
            requires=frozenset({"attention_distances", "attention_influences"}),
            scope="response",
            domains={"share": "(0, 1]", "gain": "[1, inf)", "alpha": "[0, 1]", "reach": "[1, inf)"},
            limits=(Limit({"gain": 1.0}),),
            keeps_sign=True,
        ),
        "answer_attention": MethodSpec(
            fn=answer_attention,
            paper="-",
            requires=frozenset({"importances"}),
            scope="response",
            domains={"floor": "(0, 1]"},
            limits=(Limit({"floor": 1.0}),),
            keeps_sign=True,
        ),
    },
    presets={
        "attention_illuminates": ["group_normalized", "attention_rhythm"],
        "atpo": ["group_normalized", "answer_attention"],
    },
)
