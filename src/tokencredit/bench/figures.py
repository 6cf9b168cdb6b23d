"""From what was measured to the figures of the table, each with its interval over prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.measure import Measured, Target
from tokencredit.bench.sampling import Sampled
from tokencredit.diagnostics import fidelity, gradients
from tokencredit.diagnostics.concentration import effective_token_ratio, gini
from tokencredit.diagnostics.stats import Estimate, Statistic, bootstrap, estimate, ratio_of_sums, resample_weights


class Resampling(NamedTuple):
    """The bootstrap over prompts: the unit of each prompt, the draws of the units, and the level of the intervals."""

    units: Int[np.ndarray, " prompt"]
    weights: Float[np.ndarray, "resample unit"]
    level: float

    @classmethod
    def of(cls, config: BenchConfig, units: Int[np.ndarray, " prompt"]) -> "Resampling":
        """The draws that a config asks for, the same for all methods."""
        weights = resample_weights(int(units.max()) + 1, config.resamples, "bench", config.seed)
        return cls(units, weights, config.level)

    def estimate(self, statistic: Statistic) -> Estimate:
        """A statistic with its interval."""
        return bootstrap(statistic, self.weights, self.level)

    def ratio(
        self,
        prompts: Int[np.ndarray, " item"],
        numerators: Float[np.ndarray, " item"],
        denominators: Float[np.ndarray, " item"],
    ) -> Estimate:
        """A ratio of sums over items that belong to prompts, with its interval."""
        sums = (
            np.bincount(self.units[prompts], weights=values, minlength=self.weights.shape[1])
            for values in (numerators, denominators)
        )
        return self.estimate(ratio_of_sums(*sums))


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


def gradient_figures(products: Sequence[Resampled], baseline: Sequence[Resampled] | None, level: float) -> Estimates:
    """Figures of one pipeline from its products with each target; `baseline` are those of another."""
    success, standardized, *teacher = products
    limits = dict.fromkeys(("direction", "average_direction"), 1.0)
    estimates = {
        name: _shifted(figure, success, level, limits.get(name, math.inf)) for name, figure in GRADIENT_FIGURES.items()
    }
    estimates["direction_standardized"] = _shifted(gradients.direction, standardized, level, 1.0)
    if baseline is not None:
        estimates["direction_over_baseline"] = _difference(success, baseline[0], level)
    if teacher:
        states, sequence = teacher
        estimates["teacher_direction"] = _shifted(gradients.direction, states, level, 1.0)
        estimates["teacher_expected"] = _shifted(gradients.expected_direction, states, level)
        estimates["teacher_sequence"] = _shifted(gradients.direction, sequence, level, 1.0)
        if baseline is not None:
            estimates["teacher_over_baseline"] = _difference(states, baseline[2], level)
    return estimates


def _difference(own: Resampled, other: Resampled, level: float) -> Estimate:
    """Difference of two directions, paired by prompt."""
    whole, approximate, draws = (
        gradients.direction(ours) - gradients.direction(theirs) for ours, theirs in zip(own, other, strict=True)
    )
    return _around(whole, approximate, draws, level, 2.0)


def _shifted(
    figure: Callable[[gradients.Products], Float[np.ndarray, " resample"]],
    products: Resampled,
    level: float,
    limit: float = math.inf,
) -> Estimate:
    """The exact value, and the interval from the sketched units, moved to where the value is."""
    whole, approximate, draws = (figure(item) for item in products)
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
    resampling: Resampling,
) -> dict[str, Estimate]:
    """Fidelity and concentration of one pipeline over the tokens of all replicate batches."""
    masks = [sampled.batch.response_mask for sampled in samples]
    credit = np.concatenate([item[mask].double().numpy() for item, mask in zip(advantages, masks, strict=True)])
    truth = np.concatenate([item[mask].numpy() for item, mask in zip(exact, masks, strict=True)])
    prompts = np.concatenate([_prompts_of_tokens(sampled) for sampled in samples])
    sums = fidelity.fidelity_sums(credit, truth, resampling.units[prompts])
    return {
        "rank_correlation": resampling.estimate(fidelity.rank_correlation(sums)),
        "sign_agreement": resampling.estimate(fidelity.sign_agreement(sums)),
        "captured": resampling.estimate(fidelity.captured_share(sums)),
        **concentration_figures(samples, advantages, resampling),
    }


def concentration_figures(
    samples: Sequence[Sampled], advantages: Sequence[Float[Tensor, "batch response"]], resampling: Resampling
) -> dict[str, Estimate]:
    """Mean Gini coefficient and effective-token ratio over the responses that have any credit."""
    prompts = torch.cat([sampled.batch.group_ids for sampled in samples]).numpy()
    estimates = {}
    for name, concentration in (("gini", gini), ("effective_tokens", effective_token_ratio)):
        pairs = zip(samples, advantages, strict=True)
        values = torch.cat([concentration(item, sampled.batch.response_mask) for sampled, item in pairs]).numpy()
        defined = np.isfinite(values)
        estimates[name] = resampling.ratio(prompts[defined], values[defined], np.ones(int(defined.sum())))
    return estimates


def progress_figure(
    after: Float[np.ndarray, " probe"],
    before: Float[np.ndarray, " probe"],
    possible: Float[np.ndarray, " probe"],
    resampling: Resampling,
) -> Estimate:
    """ΔV of a step as a share of that of the exact gradient's step, over the probe prompts."""
    return resampling.ratio(np.arange(len(before)), after - before, possible - before)


def products_of(measured: Measured, row: int, target: Target, resampling: Resampling) -> list[Resampled]:
    """The products of one pipeline with each target."""
    grams, squares, weights = target.grams, target.squares, resampling.weights
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


def _prompts_of_tokens(sampled: Sampled) -> Int[np.ndarray, " token"]:
    mask = sampled.batch.response_mask
    return sampled.batch.group_ids[:, None].expand(mask.shape)[mask].numpy()
