"""Credit from the trie of a group's own responses: values of shared prefixes, probabilities instead of frequencies."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokencredit.batch.draws import mix64
from tokencredit.batch.masked import chosen, compact, group_sums, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.recurrence import linear_recurrence
from tokencredit.batch.reduce import LOCAL, group_totals
from tokencredit.methods.outcome import correct_rows
from tokencredit.methods.spec import MethodSpec, Rows

OLD = frozenset({"old_logprobs"})
SALT = 0x2545F4914F6CDD1D  # keeps token ids apart from group ids, which are hashed by the same function


def success_trie(batch: TokenBatch, *, kappa: float = 4.0, threshold: float = 0.0) -> Float[Tensor, "batch response"]:
    """The policy gradient of success, from what the group's responses prove and an estimate for the rest.

        Â_t = ω(y_≤t) V̂(y_≤t) / m(y_≤t)   on accepted responses (r > threshold),   0 on the others
        V̂(s) = Σ_c π(c|s) r_c + (1 − Σ_c π(c|s)) ρ(s)
        ρ(s) = (Σ_c h(c) r_c + κ ρ(s⁻)) / (Σ_c h(c) + κ),   of the prompt Σ_c h(c) r_c / Σ_c h(c)
        ω(s) = G P(s) / (1 − (1 − P(s))^G),   h(c) = ω(c) (1 − π(c))^G

    c runs over the distinct responses of the group that start with s, s⁻ is s without its last token. P(s) = Π π_old
    and π(c|s) = π(c) / P(s) are known; m(s) counts the accepted responses through s, copies included. The first sum is
    what is proven; ρ is the success of the responses that nobody found: h(c)/G is the Horvitz–Thompson weight of c in
    the probability that a group misses. κ responses' worth of trust goes to the parent's ρ.

    Why: ∇V(x) = Σ_s P(s) V(s) ∇ ln π(last of s), over the prefixes of accepted responses alone. P(s) is known and need
    not be estimated from how often s came up; ω/G is the weight that makes up for the prefixes that did not. Failures
    enter through V̂ only. Exact, whatever κ, for a prompt whose responses were all found. Where all responses are rare
    ω is 1, and what is left is positive-only REINFORCE with shrunk values.

    Biased twice. V̂ guesses the success of the responses that nobody found. And ω makes up for prefixes that nobody
    *reached*, but credit is only paid where an *accepted* response passes: a prefix that was reached without success
    gets nothing. Example: x with probability 0.8, then a (0.5, accepted) or b. The expected credit on x over G is
    0.363, 0.365, 0.373, 0.387, 0.395 for G = 2, 3, 4, 6, 8; it should be P V = 0.4. On a it is exact.

    `threshold`: see `correct_rows`. Outcomes are accepted or not; the size of a reward is not used.

    Source: ours: Horvitz–Thompson weights from known prefix probabilities, each prefix once, shrinkage for the mass
    that nobody sampled. Values of the prefixes that a group shares are older: TEMPO (arXiv:2509.18314), T-SPMO
    (arXiv:2504.20834), RTMC (arXiv:2604.11037).
    """
    mask = batch.response_mask
    success = correct_rows(batch, threshold).double()
    logprobs = compact(chosen(batch.require("old_logprobs"), mask), mask).double()
    length = response_lengths(mask)
    inside = torch.arange(mask.shape[1], device=mask.device) < length
    keys = _prefix_keys(batch, inside)  # [batch, 1 + response]
    one = torch.ones_like(success)[:, None]
    size = group_sums(one, batch)
    copies = group_totals(one, keys.gather(1, length)[:, 0].contiguous(), batch.reducer)
    whole = logprobs.sum(1, keepdim=True)
    rest = (whole - logprobs.cumsum(1)).clamp_max(0.0).exp() / copies  # π(c|s) behind each token
    lost = (_lost_weight(whole, size) / copies).expand_as(keys)
    won = success[:, None].expand_as(keys)
    rest = pad(rest, (1, 0))  # of the prompt only `lost` is read
    known, proven, mass, gained, winners = _totals((rest, rest * won, lost, lost * won, won), keys, inside, size, batch)
    values = proven[:, 1:] + (1.0 - known[:, 1:]).clamp_min(0.0) * _rates(gained, mass, kappa)
    credit = _found_weight(logprobs.cumsum(1), size) * values / winners[:, 1:].clamp_min(1.0)
    return spread(torch.where(inside & (success[:, None] > 0), credit, 0.0), mask)


def _found_weight(logprobs: Float[Tensor, "batch step"], size: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch step"]:
    """ω = G P / (1 − (1 − P)^G), between 1 (P → 0) and G (P = 1)."""
    p = logprobs.clamp_max(0.0).exp()
    found = -torch.expm1(size * torch.log1p(-p))
    rare = p < 1e-12
    return torch.where(rare, 1.0, size * p / torch.where(rare, 1.0, found))


def _lost_weight(logprobs: Float[Tensor, "batch step"], size: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch step"]:
    """h = ω (1 − P)^G, between 0 (P = 1: never lost) and 1 (P → 0)."""
    return _found_weight(logprobs, size) * (size * torch.log1p(-logprobs.clamp_max(0.0).exp())).exp()


def _rates(
    gained: Float[Tensor, "batch prefix"], mass: Float[Tensor, "batch prefix"], kappa: float
) -> Float[Tensor, "batch response"]:
    """ρ of every prefix but the empty one: (gained + κ ρ of the parent) / (mass + κ)."""
    weights = (mass + kappa).clamp_min(1e-12)
    weights[:, 0] = mass[:, 0].clamp_min(1e-12)  # the prompt has no parent
    factors = kappa / weights
    factors[:, 0] = 0.0
    return linear_recurrence(factors, gained / weights)[:, 1:]


def _prefix_keys(batch: TokenBatch, inside: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch prefix"]:
    """A 64-bit hash of the group and of each prefix of the chosen tokens, the empty one first.

    A sum of hashes of (place, token): equal for equal prefixes, for others equal with probability 2⁻⁶⁴.
    """
    ids = compact(batch.response_ids.long(), batch.response_mask)
    places = mix64(torch.arange(ids.shape[1], device=ids.device))
    tokens = torch.where(inside, mix64(mix64(ids + SALT) ^ places), 0)
    return pad(tokens, (1, 0)).cumsum(1) + mix64(batch.group_ids.long())[:, None]


def _totals(
    stats: Sequence[Float[Tensor, "batch prefix"]],
    keys: Int[Tensor, "batch prefix"],
    inside: Bool[Tensor, "batch response"],
    size: Float[Tensor, "batch 1"],
    batch: TokenBatch,
) -> tuple[Tensor, ...]:
    """Sums of each statistic over the responses of the group that pass each prefix.

    Only of groups that are cut between processes does anything leave this one.
    """
    passes = torch.cat((torch.ones_like(inside[:, :1]), inside), dim=1)
    cut = group_totals(torch.ones_like(size), batch.group_ids) < size
    table = torch.stack(tuple(stats)).flatten(1)
    for met, reducer in ((_met(keys, passes & ~cut), LOCAL), (passes & cut, batch.reducer)):
        at = met.flatten().nonzero()[:, 0]
        totals = group_totals(table.index_select(1, at).T, keys.flatten()[at], reducer)
        table.index_copy_(1, at, totals.T)
    return table.view(len(stats), *keys.shape).unbind()


def _met(keys: Int[Tensor, "batch prefix"], passes: Bool[Tensor, "batch prefix"]) -> Bool[Tensor, "batch prefix"]:
    """Where responses meet: prefixes of several. Long responses part early, and alone each is its own sum."""
    _, index, count = keys[passes].unique(return_inverse=True, return_counts=True)
    return passes.masked_scatter(passes, (count > 1)[index])


ROWS = Rows(
    MethodSpec(success_trie, "-", requires=OLD, scope="group", domains={"kappa": "[0, inf)"}),
    presets={
        "success_trie": ["success_trie"],
    },
)
