"""Where entropy and outcome go together: the proxy detector of the quadrant analysis."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.seeds import derive


class ProxyInformation(NamedTuple):
    """Information between a token's entropy value and the outcome, in nats, bin by bin from low to high entropy.

    * `low`, `high`: range of the entropies in a bin; `tokens`: their number. Bins without tokens are left out.
    * `per_bin`: p(bin) · KL(p(r | bin) ‖ p(r)); they sum to the plug-in estimate `total`.
    * `bias`: (bins − 1) / (2 N), to be subtracted from `total`; it assumes independent tokens.
    * `null`: `per_bin` under permutations of the outcome over the responses of a prompt, one row a permutation.
    * `p_value`: share of permutations whose total is at least the observed one, (1 + #) / (1 + permutations).
    """

    low: Float[np.ndarray, " bin"]
    high: Float[np.ndarray, " bin"]
    tokens: Int[np.ndarray, " bin"]
    per_bin: Float[np.ndarray, " bin"]
    total: float
    bias: float
    null: Float[np.ndarray, "permutation bin"]
    p_value: float


def proxy_information(
    batch: TokenBatch,
    *,
    accepted: Bool[Tensor, " batch"] | None = None,
    bins: int = 20,
    permutations: int = 200,
    seed: int = 0,
) -> ProxyInformation:
    """Mutual information of a token's entropy *value* and the outcome of its response, from a histogram.

        Î = Σ_bin p(bin) · KL(p(r | bin) ‖ p(r)),   bias ≈ (bins − 1)/(2N),   null: r permuted within each prompt

    Bins hold equal counts by rank; equal entropies share a bin. `accepted` defaults to rewards above the middle of the
    smallest and the largest. The tokens of a response depend on each other and difficulty moves entropy and outcome
    alike, so the bias term alone is too small: judge by the null. This is a detector, not the information that a token
    carries about the outcome (see `capacity` for that).

    Paper: arXiv:2604.11056 v1 shows the detector without bins, estimator or number; bins, bias and null are ours.
    """
    ok = (batch.rewards > (batch.rewards.max() + batch.rewards.min()) / 2) if accepted is None else accepted
    mask = batch.response_mask.cpu().numpy()
    h = chosen(batch.require("entropies"), batch.response_mask).cpu().numpy()
    bin_of = _equal_count_bins(h[mask], bins)
    row_of = np.nonzero(mask)[0]
    kept, bin_of = np.unique(bin_of, return_inverse=True)
    counts = np.zeros((len(mask), len(kept)))  # tokens of each response in each bin
    np.add.at(counts, (row_of, bin_of), 1.0)
    outcome = ok.cpu().numpy().astype(float)
    per_bin = binned_information((outcome @ counts)[None], counts.sum(0))[0]
    shuffled = _permuted_within(outcome, batch.group_ids.cpu().numpy(), permutations, seed)
    null = binned_information(shuffled @ counts, counts.sum(0))
    beaten = int((null.sum(1) >= per_bin.sum() - 1e-12).sum())
    edges = np.array([[h[mask][bin_of == k].min(), h[mask][bin_of == k].max()] for k in range(len(kept))]).reshape(
        -1, 2
    )
    return ProxyInformation(
        low=edges[:, 0],
        high=edges[:, 1],
        tokens=counts.sum(0).astype(np.int64),
        per_bin=per_bin,
        total=float(per_bin.sum()),
        bias=max(len(kept) - 1, 0) / (2 * max(counts.sum(), 1.0)),
        null=null,
        p_value=(1 + beaten) / (1 + permutations),
    )


def binned_information(
    positives: Float[np.ndarray, "case bin"], tokens: Float[np.ndarray, " bin"]
) -> Float[np.ndarray, "case bin"]:
    """p(bin) · KL(p(r | bin) ‖ p(r)) of a binary r, from the tokens of each bin and those with r = 1; nats."""
    count = tokens.sum()
    share = positives / np.maximum(tokens, 1.0)
    whole = positives.sum(1, keepdims=True) / max(count, 1.0)
    divergence = _relative(share, whole) + _relative(1.0 - share, 1.0 - whole)
    return tokens / max(count, 1.0) * divergence


def _relative(p: Float[np.ndarray, "case bin"], q: Float[np.ndarray, "case one"]) -> Float[np.ndarray, "case bin"]:
    """p ln(p/q), 0 at p = 0; q = 0 only where p = 0."""
    safe = np.where(p > 0, p, 1.0) / np.where((p > 0) & (q > 0), q, 1.0)
    return np.where(p > 0, p * np.log(safe), 0.0)


def _equal_count_bins(values: Float[np.ndarray, " token"], bins: int) -> Int[np.ndarray, " token"]:
    """⌊bins · mean rank / N⌋: ties share their mean rank, so they share a bin."""
    _, block, size = np.unique(values, return_inverse=True, return_counts=True)
    middle = size.cumsum() - size / 2
    return np.floor(bins * middle / max(len(values), 1)).astype(np.int64)[block]


def _permuted_within(
    outcome: Float[np.ndarray, " batch"], groups: Int[np.ndarray, " batch"], permutations: int, seed: int
) -> Float[np.ndarray, "permutation batch"]:
    rng = np.random.default_rng(derive("proxy_information", seed))
    draws = rng.random((permutations, len(outcome)))
    home = np.argsort(groups, kind="stable")
    found = np.empty((permutations, len(outcome)))
    for row, draw in zip(found, draws, strict=True):
        row[home] = outcome[np.lexsort((draw, groups))]  # rows of a group, in random order, onto its places
    return found
