"""Credit only anchors, with concentrated attention, or explorers, with diffuse attention."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.attention.weights import ENTROPY_FIELDS, RENAMED, Entropy, entropy_fields
from tokencredit.methods.selection import Normalize, Side, keep_selected, lowest_or_highest, selection_scope
from tokencredit.methods.spec import Limit, MethodSpec, Rows

FIFTH: dict[str, Any] = {"keep": 0.2, "normalize": "selected"}  # the hard subsets of arXiv:2605.07660


def keep_attention(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    side: Side = "low",
    keep: float = 0.2,
    normalize: Normalize = "all",
    entropy: Entropy = "attention",
) -> Float[Tensor, "batch response"]:
    """Credit only anchors ("low") or explorers ("high").

        Â′ = Â · 1[t among the k lowest or highest Ê of its response],   k = max(1, round(keep · n))

    Ties go by position: the earlier token ranks lower. "all" divides by all tokens in the host's loss, "selected"
    multiplies by Σn / Σ1[·] over the batch, as if it divided by the selected ones. keep = 1 is the identity.

    Paper: attention entropy (arXiv:2605.07660), 20 % of the response. Its subsets divide by the selected tokens (Eq.
    17, Table 10), which is what the presets `anchors` and `explorers` do. Rounding and ties are ours.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(ENTROPY_FIELDS[entropy]), mask)
    return keep_selected(advantages, lowest_or_highest(entropies, mask, keep, side), batch, normalize)


ROWS = Rows(
    transforms={
        "keep_attention": MethodSpec(
            fn=keep_attention,
            paper="arXiv:2605.07660",
            requires=entropy_fields,
            renamed=RENAMED,
            scope=selection_scope,
            domains={"keep": "(0, 1]"},
            limits=(Limit({"keep": 1.0}),),
            keeps_sign=True,
        ),
    },
    presets={
        "anchors": ["group_normalized", {"keep_attention": FIFTH | {"side": "low"}}],
        "explorers": ["group_normalized", {"keep_attention": FIFTH | {"side": "high"}}],
        "predictive_low": ["group_normalized", {"keep_attention": FIFTH | {"side": "low", "entropy": "predictive"}}],
        "predictive_high": ["group_normalized", {"keep_attention": FIFTH | {"side": "high", "entropy": "predictive"}}],
    },
)
