"""Credit from the trie of a group's own responses: values of shared prefixes, probabilities instead of frequencies."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.masked import chosen, compact, response_lengths, spread
from tokencredit.methods.controls import _mix
from tokencredit.records import TokenBatch
from tokencredit.reduce import group_totals

SALT = 0x2545F4914F6CDD1D  # keeps token ids apart from group ids, which are hashed by the same function


def success_trie(batch: TokenBatch, *, kappa: float = 1.0, threshold: float = 0.0) -> Float[Tensor, "batch response"]:
    """The policy gradient of success, summed over the distinct accepted responses that the group happened to find.

        Â_t = ω(y_≤t) V̂(y_≤t) / m(y_≤t)   on accepted responses (r > threshold),   0 on the others
        ω(s) = G P(s) / (1 − (1 − P(s))^G)
        V̂(s) = (Σ_c ω(c) r_c + κ V̂(s⁻)) / (Σ_c ω(c) + κ),   V̂ of a whole response = 1,   V̂ of the prompt = Σ ω r / Σ ω

    P(s) = Π π_old is the probability of prefix s, 1 − (1 − P)^G that a group of G finds it: ω/G is the
    Horvitz–Thompson weight of s. c runs over the distinct responses of the group that start with s, s⁻ is s without its
    last token, m(s) counts the accepted responses through s, copies included. κ shrinks the values of rare prefixes to
    their parents'.

    Why: ∇V(x) = Σ_s P(s) V(s) ∇ ln π(last of s), over the prefixes of accepted responses alone, and P(s) is known: it
    need not be estimated from how often s came up. Failures enter through V̂ only. Where all responses are rare (P → 0)
    ω is 1, and what is left is positive-only REINFORCE with shrunk values of prefixes. Biased through V̂, and through
    accepted responses that no rollout found.

    Source: ours. Deviation from an estimate that any reward would allow: outcomes are accepted or not.
    """
    mask = batch.response_mask
    success = (batch.rewards > threshold).double()
    logprobs = compact(chosen(batch.require("old_logprobs"), mask), mask)
    length = response_lengths(mask)
    inside = torch.arange(mask.shape[1], device=mask.device) < length
    keys = _prefix_keys(batch, inside)  # [batch, 1 + response]
    size = group_totals(torch.ones_like(success)[:, None], batch.group_ids, batch.reducer)
    copies = group_totals(torch.ones_like(success)[:, None], keys.gather(1, length)[:, 0].contiguous(), batch.reducer)
    weight = (_found_weight(logprobs.sum(1, keepdim=True), size) / copies)[:, 0]
    mass, won, winners = _totals(torch.stack((weight, weight * success, success), 1), keys, inside, batch)
    value = won[:, :1] / mass[:, :1]
    values = []
    for t in range(1, keys.shape[1]):
        value = (won[:, t : t + 1] + kappa * value) / (mass[:, t : t + 1] + kappa).clamp_min(1e-12)
        values.append(torch.where(length == t, success[:, None], value))
    expected = torch.cat(values, dim=1) if values else torch.zeros_like(logprobs)
    credit = _found_weight(logprobs.cumsum(1), size) * expected / winners[:, 1:].clamp_min(1.0)
    return spread(torch.where(inside & (success[:, None] > 0), credit, 0.0), mask)


def _found_weight(logprobs: Float[Tensor, "batch step"], size: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch step"]:
    """G P / (1 − (1 − P)^G), between 1 (P → 0) and G (P = 1)."""
    p = logprobs.clamp_max(0.0).exp()
    found = -torch.expm1(size * torch.log1p(-p))
    rare = p < 1e-12
    return torch.where(rare, 1.0, size * p / torch.where(rare, 1.0, found))


def _prefix_keys(batch: TokenBatch, inside: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch prefix"]:
    """A 64-bit hash of the group and of each prefix of the chosen tokens, the empty one first."""
    ids = compact(batch.response_ids.long(), batch.response_mask)
    keys = [_mix(batch.group_ids.long())]
    for t in range(ids.shape[1]):
        keys.append(torch.where(inside[:, t], _mix(keys[-1] ^ _mix(ids[:, t] + SALT)), keys[-1]))
    return torch.stack(keys, dim=1)


def _totals(
    stats: Float[Tensor, "batch stat"],
    keys: Int[Tensor, "batch prefix"],
    inside: Bool[Tensor, "batch response"],
    batch: TokenBatch,
) -> tuple[Tensor, ...]:
    """Sums of each statistic over the responses of the group that pass each prefix, [batch, prefix] each."""
    passes = torch.cat((torch.ones_like(inside[:, :1]), inside), dim=1)[:, :, None]
    given = torch.where(passes, stats[:, None, :], 0.0)  # [batch, prefix, stat]
    found = group_totals(given.flatten(0, 1), keys.flatten(), batch.reducer)
    return found.view(given.shape).unbind(2)
