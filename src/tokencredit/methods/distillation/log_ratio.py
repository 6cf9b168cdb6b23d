"""On-policy distillation as credit: the teacher's log-ratio, and what moves it between the tokens of a rollout.

The gap is ln π_T − ln π_θ of the sampled token, in nats, at the sampling temperature, detached: never an objective.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, positions, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.controls import response_fingerprints, share_of, token_uniforms

EPS = 1e-8
GRID = 256  # samples of a weight profile that one rollout lends to another
TILE = 256  # tokens of `teacher_confidence` at a time: bounds its windows to [batch, TILE, window]
FEW = 16  # of the largest values of a window: up to here they are carried along, above they are selected anew


def teacher_log_ratio(batch: TokenBatch, *, lam: float = 1.0) -> Float[Tensor, "batch response"]:
    """On-policy distillation: how much more the teacher likes the sampled token than the student does.

        A_t = λ (ln π_T − ln π_ref) − (ln π_θ − ln π_ref)        λ = 1:  A_t = ln π_T − ln π_θ, whatever the reference

    On samples of the student E[A] = −KL(π_θ‖π_T) ≤ 0 and E[A ∇ln π_θ] = −∇KL(π_θ‖π_T) at each prefix: return-to-go is
    dropped. Rewards are not read. λ = 0 is a pull back to the reference.

    Paper: OPD as a policy gradient with λ = 1; ExOPD (arXiv:2602.12125) with λ = 1.25, its reference the student's
    first weights.
    """
    student = chosen(batch.require("old_logprobs"), batch.response_mask)
    teacher = chosen(batch.require("teacher_logprobs"), batch.response_mask)
    if lam == 1.0:
        return teacher - student
    reference = chosen(batch.require("ref_logprobs"), batch.response_mask)
    return lam * (teacher - reference) - (student - reference)


def teacher_gap(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """ln π_T − ln π_θ of the sampled token in float64, 0 outside the mask; the signal of every method here."""
    return teacher_log_ratio(batch)


def prefix_discrepancy(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    gamma: float = 0.5,
    discrepancy: Literal["unsigned", "signed"] = "unsigned",
    denominator: Literal["all", "drop_last"] = "all",
    floor: bool = True,
    scale: Literal["none", "unit_mass"] = "none",
) -> Float[Tensor, "batch response"]:
    """IW-OPD: more credit where the rollout has disagreed little with the teacher so far.

        d_t = |gap_t|,   F_t = Σ_{k<t} d_k / (Σ_k d_k + ε),   w_t = 1 + γ clip(1 − F_t, 0, 1),   Â′_t = w_t Â_t

    w lies in [1, 1 + γ], starts at 1 + γ and never rises (unsigned). Σ w d / Σ d ≥ 1 + γ/2 on every rollout, so compare
    with `constant_scale` or `scale="unit_mass"` (Σ w d = Σ d). Constant d gives `position_decay`; γ = 0 is the
    identity. The gap is ln π_T − ln π_θ, also where Â is that of ExOPD.

    * `discrepancy="signed"`: d_t = gap_t. `floor=False`: w = 1 − F, the surrogate alone, whatever γ.
    * `denominator="drop_last"`: Σ without the last token, whose weight is then exactly 1.

    Paper: arXiv:2606.22600. The defaults follow its release (`denominator`, ε = 1e-8); "drop_last" is its Eq. 17.
    `unit_mass` is ours. Deviations: none in the numbers; rows may have holes.
    """
    weights = discrepancy_weights(
        batch, gamma=gamma, discrepancy=discrepancy, denominator=denominator, floor=floor, scale=scale
    )
    return chosen(advantages, batch.response_mask) * weights


def lambda_discrepancy(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, gamma: float = 0.5
) -> Float[Tensor, "batch response"]:
    """IW-ExOPD with the weight on λ: only the pull towards the teacher is weighted.

        Â′_t = w_t λ (ln π_T − ln π_ref) − (ln π_θ − ln π_ref)        w as in `prefix_discrepancy`

    Right behind `teacher_log_ratio` only, whose λ it takes over. Can change signs. γ = 0 is the identity.

    Source: the authors' page of arXiv:2606.22600 ("modulating λ with the weight"); their release does otherwise.
    """
    drift = chosen(batch.require("old_logprobs"), batch.response_mask)
    drift = drift - chosen(batch.require("ref_logprobs"), batch.response_mask)
    a = chosen(advantages, batch.response_mask)
    return discrepancy_weights(batch, gamma=gamma) * (a + drift) - drift


def discrepancy_weights(
    batch: TokenBatch,
    *,
    gamma: float = 0.5,
    discrepancy: Literal["unsigned", "signed"] = "unsigned",
    denominator: Literal["all", "drop_last"] = "all",
    floor: bool = True,
    scale: Literal["none", "unit_mass"] = "none",
) -> Float[Tensor, "batch response"]:
    """w of `prefix_discrepancy`; 0 outside the mask."""
    mask = batch.response_mask
    gap = teacher_gap(batch)
    d = gap if discrepancy == "signed" else gap.abs()
    before = d.cumsum(1) - d
    last = mask & (positions(mask) == response_lengths(mask) - 1)
    counted = d if denominator == "all" else torch.where(last, 0.0, d)
    left = (1.0 - before / (counted.sum(1, keepdim=True) + EPS)).clamp(0.0, 1.0)
    weights = 1.0 + gamma * left if floor else left
    if scale == "unit_mass":
        weights = weights / mass_multiplier(weights, gap)
    return chosen(weights, mask)


def mass_multiplier(
    weights: Float[Tensor, "batch response"], gap: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch 1"]:
    """Σ w |gap| / Σ |gap| of each rollout: the constant that gives the same advantage mass; 1 where the gap is 0."""
    mass = gap.abs().sum(1, keepdim=True)
    weighted = (weights * gap.abs()).sum(1, keepdim=True)
    return torch.where((mass > 0) & (weighted > 0), weighted / torch.where(mass > 0, mass, 1.0), 1.0)


def reordered_discrepancy(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    gamma: float = 0.5,
    order: Literal["shuffled", "reversed", "borrowed", "constant"] = "shuffled",
) -> Float[Tensor, "batch response"]:
    """The controls of `prefix_discrepancy`: its weights, in the wrong places.

        Â′_t = w̃_t Â_t

    * "shuffled": w permuted within the rollout, same histogram. "reversed": w̃_t = 1 + γ F_t.
    * "borrowed": w of another rollout of the batch at the same relative position (the next in the order of their
      fingerprints, read on a grid of 256 places): what is left of the gain is positional.
    * "constant": Σ w d / Σ d of the rollout on every token, the scale without the shape.

    γ = 0 is the identity.

    Source: ours.
    """
    mask = batch.response_mask
    weights = discrepancy_weights(batch, gamma=gamma)
    if order == "shuffled":
        weights = _shuffled(weights, batch, generator)
    elif order == "reversed":
        weights = 2.0 + gamma - weights
    elif order == "borrowed":
        weights = _borrowed(weights, batch)
    else:
        weights = mass_multiplier(weights, teacher_gap(batch)).expand_as(weights)
    return chosen(advantages, mask) * chosen(weights, mask)


def _shuffled(
    x: Float[Tensor, "batch response"], batch: TokenBatch, generator: torch.Generator
) -> Float[Tensor, "batch response"]:
    """`x` permuted among the chosen tokens of each response."""
    mask = batch.response_mask
    behind = torch.arange(mask.shape[1], device=mask.device) >= response_lengths(mask)
    draws = torch.where(behind, 2.0, compact(token_uniforms(batch, generator), mask))
    return spread(compact(x, mask).gather(1, draws.argsort(dim=1)), mask)


def _borrowed(x: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """`x` of the next response of the batch, on all ranks, at the same share of the way."""
    mask, length = batch.response_mask, response_lengths(batch.response_mask)
    if mask.shape[1] == 0:
        return x
    names = response_fingerprints(batch.response_ids, positions(mask), mask)
    labels = batch.reducer.labels(names)
    row = torch.searchsorted(labels, names)
    middles = 2 * torch.arange(GRID, device=mask.device) + 1  # of the grid's places, in halves of a place
    grid = compact(x, mask).gather(1, middles * length // (2 * GRID))
    # Responses of the same tokens, and empty ones, share a label: the last column counts what was added.
    filled = torch.where(length > 0, torch.nn.functional.pad(grid, (0, 1), value=1.0), 0.0)
    table = batch.reducer.total(filled.new_zeros(labels.numel(), GRID + 1).index_add_(0, row, filled))
    known = table[:, -1] > 0
    if not bool(known.any()):
        return x
    table = table[known]
    lender = table[known.long().cumsum(0)[row] % len(table)]  # the cumulative sum is the own place plus one
    place = ((2 * positions(mask) + 1) * GRID // (2 * length.clamp_min(1))).clamp(0, GRID - 1)
    return chosen((lender[:, :-1] / lender[:, -1:]).gather(1, place), mask)


def prefix_ratio(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    alpha: float = 0.001,
    blend: bool = False,
    gamma: float = 0.5,
) -> Float[Tensor, "batch response"]:
    """The ideal prefix ratio of IW-OPD's derivation, which is brittle.

        r_t = exp(α Σ_{k<t} gap_k),   r̃_t = r_t / mean r_t,   Â′_t = r̃_t Â_t        blend:  (1 + γ r̃_t) Â_t

    The mean runs over the rollouts of the batch that still have a token at position t; exponents are clamped to ±20.
    α = 0 without `blend` is the identity.

    Paper: arXiv:2606.22600, the idea; the estimator of the mean is ours. α = 1 and 0.1 vanish within some 60 tokens.
    """
    mask = batch.response_mask
    gap = teacher_gap(batch)
    ratio = (alpha * (gap.cumsum(1) - gap)).clamp(-20.0, 20.0).exp()
    alive = compact(chosen(torch.ones_like(ratio), mask), mask)
    total, count = _position_totals(compact(chosen(ratio, mask), mask), batch), _position_totals(alive, batch)
    mean = spread((total / count.clamp_min(1.0)).expand_as(ratio), mask)
    relative = ratio / torch.where(mean > 0, mean, 1.0)
    return chosen(advantages, mask) * (1.0 + gamma * relative if blend else relative)


def _position_totals(compacted: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "1 response"]:
    """Sum over the batch, position by position; ranks may be padded to different lengths."""
    own = compacted.shape[1]
    longest = int(batch.reducer.maximum(torch.tensor(own, device=compacted.device)))
    return batch.reducer.total(torch.nn.functional.pad(compacted.sum(0, keepdim=True), (0, longest - own)))[:, :own]


def teacher_confidence(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    window: int = 64,
    q: float = 0.9,
    alpha: float = 1.0,
    w_min: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """Less credit where the teacher was surprised by the last tokens of the prefix.

        Q_t = mean of the ⌊(1 − q) n⌋ largest −ln π_T among the n ≤ `window` tokens before t (at least one)
        w_t = max(exp(−α Q_t), w_min),   w_1 = 1,   Â′_t = w_t Â_t

    The student is not read. α = 0 is the identity.

    Source: the release of arXiv:2606.22600, a variant that its paper does not evaluate.
    """
    mask = batch.response_mask
    surprise = compact((-chosen(batch.require("teacher_logprobs"), mask)).clamp_min(0.0), mask)
    worst = _worst_means(surprise, window, q)
    weights = torch.exp(-alpha * worst).clamp_min(w_min)
    weights = torch.cat((torch.ones_like(weights[:, :1]), weights[:, 1:]), 1)
    return chosen(advantages, mask) * spread(weights, mask)


def _worst_means(surprise: Float[Tensor, "batch response"], window: int, q: float) -> Float[Tensor, "batch response"]:
    """Q of every token; where the windows are full and few values count, in time that does not grow with the window."""
    width = surprise.shape[1]
    few = int(_wanted(torch.tensor(window), q))
    full = window if few <= FEW and window < width else width  # the first token with a full window
    parts = [_worst_mean(surprise[:, :full], start, window, q) for start in range(0, full, TILE)]
    if full < width:
        parts.append(_full_windows(surprise[:, :-1], window, few).clamp_min(0.0) / few)
    return torch.cat(parts, 1) if parts else surprise


def _full_windows(x: Float[Tensor, "batch response"], window: int, few: int) -> Float[Tensor, "batch starts"]:
    """Sum of the `few` largest of x_p … x_{p + window − 1}, for every p that leaves a whole window.

    In blocks of `window` places each window is the end of one block and the beginning of the next; the largest values
    of both are carried along, and two falling lists a, b hold theirs among max(a_i, b_{few − 1 − i}).
    """
    rows, width = x.shape
    blocks = -(-width // window)
    padded = torch.nn.functional.pad(x, (0, blocks * window - width), value=-torch.inf)
    places = padded.view(rows, blocks, window).permute(2, 0, 1).contiguous()
    ends = _carried(places.flip(0), few).flip(1).permute(0, 2, 3, 1).reshape(few, rows, blocks * window)
    begins = _carried(places, few)
    begins[:, -1] = -torch.inf  # where a window is one block, its end is all of it
    begins = begins.permute(0, 2, 3, 1).reshape(few, rows, blocks * window)
    count = width - window + 1
    return torch.maximum(ends[..., :count], begins.flip(0)[..., window - 1 : window - 1 + count]).sum(0)


def _carried(places: Float[Tensor, "window batch block"], few: int) -> Float[Tensor, "few window batch block"]:
    """The `few` largest values up to each place, falling."""
    largest = [torch.full_like(places[0], -torch.inf) for _ in range(few)]
    found = places.new_empty(few, *places.shape)
    for place, value in enumerate(places):
        for number in range(few):
            largest[number], value = torch.maximum(largest[number], value), torch.minimum(largest[number], value)
            found[number, place] = largest[number]
    return found


def _wanted(seen: Int[Tensor, "*tile"], q: float) -> Int[Tensor, "*tile"]:
    """How many of the tokens seen count: ⌊(1 − q) · seen⌋, at least one."""
    return share_of(1.0 - q, seen).floor().long().clamp_min(1)


def _worst_mean(surprise: Float[Tensor, "batch response"], start: int, window: int, q: float) -> Tensor:
    """Q of the tokens start … start + TILE − 1, [batch, tile]."""
    stop = min(start + TILE, surprise.shape[1])
    first = start - window
    left = surprise[:, max(first, 0) : max(stop - 1, 0)]
    left = torch.nn.functional.pad(left, (max(-first, 0), 0), value=-torch.inf)
    seen = torch.arange(start, stop, device=surprise.device).clamp(max=window)
    wanted = _wanted(seen, q)
    largest = left.unfold(1, window, 1).topk(min(window, int(wanted.max())), dim=2).values.clamp_min(0.0)
    total = largest.cumsum(2).gather(2, (wanted - 1).expand(surprise.shape[0], -1)[..., None])[..., 0]
    return total / wanted
