"""From what was measured to the figures of the table, each with its interval over prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.bench.measure import Measured, Target
from tokencredit.bench.problem import Sampled
from tokencredit.diagnostics import fidelity, gradients
from tokencredit.diagnostics.concentration import effective_token_ratio, gini
from tokencredit.diagnostics.stats import Estimate, bootstrap, estimate, ratio_of_sums


class Resampled(NamedTuple):
    """Products of the sums over all units: exactly, from the units' sketches, and of every resample from sketches."""

    whole: gradients.Products
    approximate: gradients.Products
    draws: gradients.Products


Estimates = dict[str, Estimate]

# Key, what it is, and its unit: the one list that the table, the page and the documentation read.
FIGURES: dict[str, str] = {
    "direction": "cosine of one batch's gradient estimate with the exact gradient ∇ΣV, mean over replicate batches",
    "direction_over_baseline": "difference of `direction` to that of the baseline (grpo), paired by prompt",
    "direction_standardized": "the same against Σ ∇V/√(V(1−V)), which GRPO aims at",
    "average_direction": "cosine of the average over the replicate batches with ∇ΣV",
    "expected_direction": "cosine of the expected estimate with ∇ΣV, sampling noise removed; 1 is unbiased",
    "signal_to_noise": "‖E ĝ‖² / tr Var ĝ of one batch",
    "progress": "exact ΔV after a step of the common length, as a share of the exact gradient's",
    "teacher_direction": "cosine of one batch's estimate with −Σ_s P(s) ∇KL(π(·|s) ‖ ρ(·|s)), ρ the teacher",
    "teacher_over_baseline": "difference of `teacher_direction` to that of the baseline, paired by prompt",
    "teacher_expected": "cosine of the expected estimate with it, sampling noise removed; 1 for OPD",
    "teacher_sequence": "cosine of one batch's estimate with −∇KL(π(·|x) ‖ ρ(·|x)) of whole responses",
    "rank_correlation": "Spearman correlation of the advantages with A* over all tokens",
    "sign_agreement": "share of Σ|A*| on credited tokens whose sign is right",
    "captured": "share of Σ|A*| on the fifth of the tokens with the largest |Â|",
    "gini": "Gini coefficient of |Â| over a response, mean over responses",
    "effective_tokens": "(Σ|Â|)² / (n ΣÂ²) of a response, mean over responses",
}


GRADIENT_FIGURES = {
    "direction": gradients.direction,
    "average_direction": gradients.average_direction,
    "expected_direction": gradients.expected_direction,
    "signal_to_noise": gradients.signal_to_noise,
}


def gradient_figures(found: Sequence[Resampled], baseline: Sequence[Resampled] | None, level: float) -> Estimates:
    """Figures of one pipeline from its products with each target; `baseline` are those of another."""
    success, standardized, *teacher = found
    limits = dict.fromkeys(("direction", "average_direction"), 1.0)
    estimates = {
        name: _moved(figure, success, level, limits.get(name, math.inf)) for name, figure in GRADIENT_FIGURES.items()
    }
    estimates["direction_standardized"] = _moved(gradients.direction, standardized, level, 1.0)
    if baseline is not None:
        estimates["direction_over_baseline"] = _over(success, baseline[0], level)
    if teacher:
        states, sequence = teacher
        estimates["teacher_direction"] = _moved(gradients.direction, states, level, 1.0)
        estimates["teacher_expected"] = _moved(gradients.expected_direction, states, level)
        estimates["teacher_sequence"] = _moved(gradients.direction, sequence, level, 1.0)
        if baseline is not None:
            estimates["teacher_over_baseline"] = _over(states, baseline[2], level)
    return estimates


def _over(own: Resampled, other: Resampled, level: float) -> Estimate:
    """Difference of two directions, paired by prompt."""
    whole, approximate, draws = (
        gradients.direction(ours) - gradients.direction(theirs) for ours, theirs in zip(own, other, strict=True)
    )
    return _around(whole, approximate, draws, level, 2.0)


def _moved(
    figure: Callable[[gradients.Products], Float[np.ndarray, " resample"]],
    found: Resampled,
    level: float,
    limit: float = math.inf,
) -> Estimate:
    """The exact value, and the interval from the sketched units, moved to where the value is."""
    whole, approximate, draws = (figure(item) for item in found)
    return _around(whole, approximate, draws, level, limit)


def _around(
    whole: Float[np.ndarray, " one"],
    approximate: Float[np.ndarray, " one"],
    draws: Float[np.ndarray, " resample"],
    level: float,
    limit: float,
) -> Estimate:
    """An estimate whose interval ends at ±`limit`: moving an interval of cosines could push it past 1."""
    value = float(np.clip(whole[0], -limit, limit))  # a rounding above 1 is 1
    return estimate(value, np.clip(draws + (whole[0] - approximate[0]), -limit, limit), level)


def token_figures(
    samples: Sequence[Sampled],
    advantages: Sequence[Float[Tensor, "batch response"]],
    exact: Sequence[Float[Tensor, "batch response"]],
    units: Int[np.ndarray, " prompt"],
    weights: Float[np.ndarray, "resample unit"],
    level: float,
) -> dict[str, Estimate]:
    """Fidelity and concentration of one pipeline over the tokens of all replicate batches."""
    pairs = list(zip(samples, advantages, strict=True))
    credit = np.concatenate([item[sampled.batch.response_mask].double().numpy() for sampled, item in pairs])
    truth = np.concatenate([item[s.batch.response_mask].numpy() for s, item in zip(samples, exact, strict=True)])
    token_units = np.concatenate([units[_owners_of_tokens(sampled)] for sampled in samples])
    sums = fidelity.fidelity_sums(credit, truth, token_units)
    return {
        "rank_correlation": bootstrap(fidelity.rank_correlation(sums), weights, level),
        "sign_agreement": bootstrap(fidelity.sign_agreement(sums), weights, level),
        "captured": bootstrap(fidelity.captured_share(sums), weights, level),
        **concentration_figures(samples, advantages, units, weights, level),
    }


def concentration_figures(
    samples: Sequence[Sampled],
    advantages: Sequence[Float[Tensor, "batch response"]],
    units: Int[np.ndarray, " prompt"],
    weights: Float[np.ndarray, "resample unit"],
    level: float,
) -> dict[str, Estimate]:
    """Mean Gini coefficient and effective-token ratio over the responses that have any credit."""
    found = {}
    for name, measure in (("gini", gini), ("effective_tokens", effective_token_ratio)):
        pairs = zip(samples, advantages, strict=True)
        values = torch.cat([measure(item, sampled.batch.response_mask) for sampled, item in pairs]).numpy()
        owners = units[torch.cat([sampled.batch.group_ids for sampled in samples]).numpy()]
        defined, count = np.isfinite(values), int(units.max()) + 1
        total = np.bincount(owners[defined], weights=values[defined], minlength=count)
        number = np.bincount(owners[defined], minlength=count).astype(np.float64)
        found[name] = bootstrap(ratio_of_sums(total, number), weights, level)
    return found


def progress_figure(
    after: Float[np.ndarray, " probe"],
    before: Float[np.ndarray, " probe"],
    best: Float[np.ndarray, " probe"],
    units: Int[np.ndarray, " prompt"],
    weights: Float[np.ndarray, "resample unit"],
    level: float,
) -> Estimate:
    """ΔV of a step as a share of that of the exact gradient's step, over the probe prompts."""
    owners, count = units[: len(before)], weights.shape[1]
    gained = np.bincount(owners, weights=after - before, minlength=count)
    possible = np.bincount(owners, weights=best - before, minlength=count)
    return bootstrap(ratio_of_sums(gained, possible), weights, level)


def products_of(
    measured: Measured, row: int, target: Target, weights: Float[np.ndarray, "resample unit"]
) -> list[Resampled]:
    """The products of one pipeline with each target."""
    grams, squares = target.grams, target.squares
    once = np.ones((1, weights.shape[1]))
    own_total = measured.own_total[row][None]
    return [
        Resampled(
            gradients.Products(own_total, measured.cross_total[row, index][None], squares[index : index + 1]),
            gradients.products(measured.own[row], measured.cross[row, index], grams[index], once),
            gradients.products(measured.own[row], measured.cross[row, index], grams[index], weights),
        )
        for index in range(len(target.names))
    ]


def as_json(figures: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
    """Estimates as [value, low, high], null where undefined."""
    return {
        name: [float(x) if np.isfinite(x) else None for x in estimate] for name, estimate in sorted(figures.items())
    }


def _owners_of_tokens(sampled: Sampled) -> Int[np.ndarray, " token"]:
    mask = sampled.batch.response_mask
    return sampled.batch.group_ids[:, None].expand(mask.shape)[mask].numpy()
