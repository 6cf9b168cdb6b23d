"""Exact credit: advantages from values, and what the values of a state's children say about its tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.spec import MethodSpec, Rows


def exact_advantage(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """How much a token changed the probability of success.

        A*_t = V(y_≤t) − V(y_<t),        V after the last chosen token = reward

    V is `batch.values`, the value of the prefix before each token. The credits of a response telescope:
    Σ_t A*_t = reward − V(prompt). With exact values and 0/1 rewards, Σ_t A*_t ∇ ln π(y_t) is an unbiased estimate of
    the gradient of the success probability; with estimated values it is VinePPO's advantage at one token a step.

    Source: ours; the definition is the textbook advantage. VinePPO (arXiv:2410.01679) estimates it by sampling.
    """
    mask = batch.response_mask
    before = compact(chosen(batch.require("values"), mask), mask)
    last = response_lengths(mask) - 1
    after = torch.cat((before[:, 1:], before.new_zeros(len(before), 1)), dim=1)
    at_end = torch.arange(mask.shape[1], device=mask.device) == last
    after = torch.where(at_end, batch.rewards.detach().double()[:, None], after)
    return spread(after - before, mask)


def binary_entropy(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """h_b(p) = −p ln p − (1−p) ln(1−p) in nats; 0 at 0 and 1."""
    return torch.special.entr(p) + torch.special.entr(1.0 - p)


def hindsight_posterior(
    probs: Float[Tensor, "*state vocab"], q: Float[Tensor, "*state vocab"], *, success: bool
) -> Float[Tensor, "*state vocab"]:
    """The policy at a state, given how the response ended.

        π_hs(v | r) ∝ π(v) p(r | v):      π(v) Q(v) / V  after a success,   π(v) (1 − Q(v)) / (1 − V)  after a failure

    `q` is the success probability after each token. The policy itself where the outcome has probability 0.

    Paper: arXiv:2604.11056 v1 for the form; the binary case is ours.
    """
    joint = probs * (q if success else 1.0 - q)
    total = joint.sum(-1, keepdim=True)
    return torch.where(total > 0, joint / torch.where(total > 0, total, 1.0), probs)


def bernoulli_divergence(q: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """kl(q ‖ value) = q ln(q / value) + (1−q) ln((1−q) / (1−value)) in nats, for probabilities of a 0/1 outcome.

    0 where q = value, 0 and 1 included. `value` = 0 is only met with q = 0, as values are averages of q.
    """
    tiny = torch.finfo(value.dtype).tiny
    success = torch.xlogy(q, q / value.clamp_min(tiny))
    return (success + torch.xlogy(1.0 - q, (1.0 - q) / (1.0 - value).clamp_min(tiny))).clamp_min(0.0)


def outcome_information(
    probs: Float[Tensor, "*state child"], q: Float[Tensor, "*state child"]
) -> Float[Tensor, "*state"]:
    """Information about a 0/1 outcome in the token that is sampled at a state, in nats.

        I(o; r | s) = h_b(V) − Σ_v π(v) h_b(Q(v)) = Σ_v π(v) kl(Q(v) ‖ V),        V = Σ_v π(v) Q(v)

    `probs` may leave out tokens after which success is impossible: the mass 1 − Σ π that is missing has Q = 0. The
    second form is used: it adds terms that are not negative, where the first subtracts numbers that are nearly equal.
    The bound of arXiv:2604.11056 is I ≤ H; the sharper one is I ≤ min(H, h_b(V)).

    Source: ours (T2 and T4 of the capacity theory).
    """
    value = (probs * q).sum(-1)
    missing = (1.0 - probs.sum(-1)).clamp_min(0.0)
    inside = (probs * bernoulli_divergence(q, value[..., None].expand_as(q))).sum(-1)
    return inside + missing * bernoulli_divergence(torch.zeros_like(value), value)


ROWS = Rows(
    estimators={
        "exact_advantage": MethodSpec(
            fn=exact_advantage, is_exact=True, paper="-", requires=frozenset({"values"}), scope="response"
        ),
    },
    presets={
        "exact": ["exact_advantage"],
    },
    controls={
        "exact (shuffled)": ["exact_advantage", "shuffle_within_response"],
        "exact (reversed)": ["exact_advantage", "reverse"],
        "exact (mean)": ["exact_advantage", "mean_within_response"],
    },
)
