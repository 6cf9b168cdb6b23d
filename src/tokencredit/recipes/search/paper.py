"""The search of the paper (arXiv:2605.12944), without its language model: edits of one anchor, UCB on programs."""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from tokencredit.recipes.evaluate.history import Evaluation, usable
from tokencredit.recipes.program.recipe import Recipe, Step, make_recipe, make_step
from tokencredit.recipes.search.policies import (
    Anchor,
    Candidate,
    Choice,
    Chooser,
    choose_best,
    fresh,
    reseed_due,
    reseeded_motif,
    with_forecasts,
)
from tokencredit.recipes.search.propose import Space
from tokencredit.recipes.search.surrogate import matern, negative_log_likelihood

# The paper names bins and gives no edges; these are the aims of the released code.
AIMS = ((0.05, 0.15), (0.30, 0.50), (0.60, 0.70))
ALPHA = 0.01  # noise variance on standardised scores, released code


def choose_paper(chooser: Chooser, history: Sequence[Evaluation]) -> Choice:
    """Warm-up recipes at three retentions, then edits of the anchor, ranked by UCB of a process on ψ.

    The anchor starts as the best warm-up. With `anchor: seed` (the paper) it stays until it is reseeded, with
    `anchor: incumbent` (the released code) it follows the best score. A reseeded anchor costs no evaluation.
    """
    settings, slot = chooser.config.search, len(history) + 1
    if slot <= settings.warmup:
        recipe = warm_up_recipe(chooser.space, AIMS[(slot - 1) % len(AIMS)], chooser.rng("paper warm-up", slot))
        candidate = chooser.materialise(recipe, kind="warm-up")
        return Choice(candidate) if not candidate.why else Choice(fresh(chooser, slot), [candidate])
    good = usable(history)
    if not good:
        return Choice(fresh(chooser, slot))
    candidates = chooser.edits([anchor_of(chooser, history)], settings.candidates, chooser.rng("paper propose", slot))
    open_candidates = [candidate for candidate in candidates if not candidate.why]
    if not open_candidates:
        return Choice(fresh(chooser, slot), candidates)
    return choose_best(chooser, history, candidates, score_programs(chooser, good, open_candidates))


def warm_up_recipe(space: Space, aim: tuple[float, float], rng: np.random.Generator) -> Recipe:
    """random_k and one to three filters, each with the ratio ρ^(1/steps) · U(.92, 1.08); never a dedup."""
    target = float(rng.uniform(*aim))
    filters = [op for op in space.operators if op in {"top", "top_union"}]
    count = int(rng.integers(1, 4)) if filters else 0
    ratios = np.clip(target ** (1 / (count + 1)) * rng.uniform(0.92, 1.08, count + 1), 0.05, 0.95).tolist()
    steps: list[Step] = []
    for ratio in ratios[1:]:
        if str(rng.choice(filters)) == "top":
            steps.append(make_step("top", signal=str(rng.choice(space.scalars)), fraction=round(ratio, 3)))
        else:
            steps.append(make_step("top_union", signals=list(space.relevance), fraction=round(ratio, 3)))
    draw = make_step("random_k", k=max(1, round(ratios[0] * space.samples)), seed=space.seed)
    return make_recipe([draw, *steps])


def anchor_of(chooser: Chooser, history: Sequence[Evaluation]) -> Anchor:
    """The recipe that is edited next, and its slot where it was evaluated."""
    settings = chooser.config.search
    good = usable(history)
    reseeded = [evaluation.slot for evaluation in history if evaluation.reseed]
    if reseeded:
        until = [evaluation for evaluation in good if evaluation.slot <= reseeded[-1]]
        return reseeded_motif(chooser, until, reseeded[-1]), None
    base = [e for e in good if e.slot <= settings.warmup] if settings.anchor == "seed" else good
    best = max(base or good, key=lambda evaluation: evaluation.value)
    return best.recipe, best.slot


def best_so_far(history: Sequence[Evaluation]) -> list[int | None]:
    """The slot of the highest score after each run; a tie is no improvement."""
    leader, leaders = None, []
    score = -np.inf
    for evaluation in history:
        if evaluation.ok and evaluation.value > score:
            leader, score = evaluation.slot, evaluation.value
        leaders.append(leader)
    return leaders


def stagnated(history: Sequence[Evaluation], warmup: int, patience: int) -> bool:
    """Whether `patience` runs in a row, since the warm-up or the last reseed, brought no higher score."""
    return reseed_due(best_so_far(history)[max(warmup - 1, 0) :], patience)


def score_programs(chooser: Chooser, good: Sequence[Evaluation], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mean and sd from C · Matérn-5/2 with one length scale on ψ, noise variance .01 on standardised scores."""
    known = chooser.programs([evaluation.recipe for evaluation in good])
    points = chooser.programs([candidate.recipe for candidate in candidates])
    scores = np.array([evaluation.score for evaluation in good], dtype=np.float64)
    level, scale = float(scores.mean()), float(scores.std()) or 1.0
    mean, sd = matern_posterior(known, (scores - level) / scale, points)
    return with_forecasts(candidates, level + scale * mean, scale * sd)


def matern_posterior(known: np.ndarray, scores: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum-likelihood constant and length scale in [.01, 100], on a grid that is refined twice.

    Two parameters need no restarts: the grid sees every basin, and is the same on every machine.
    """
    squared = ((known[:, None] - known[None]) ** 2).sum(2)
    noise = ALPHA * np.eye(len(scores))
    centre, reach = np.array([0.0, 0.0]), np.array([np.log(1e3), np.log(100.0)])
    for _ in range(3):
        axes = [np.linspace(c - r, c + r, 17) for c, r in zip(centre, reach, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        centre = grid[np.argmin(negative_log_likelihood(_kernel(squared, grid) + noise, scores))]
        reach = reach / 8
    factor = cho_factor(_kernel(squared, centre) + noise, lower=True)
    cross = _kernel(((points[:, None] - known[None]) ** 2).sum(2), centre)
    variance = np.exp(centre[0]) - (cross * cho_solve(factor, cross.T).T).sum(1)
    return cross @ cho_solve(factor, scores), np.sqrt(np.maximum(variance, 1e-12))


def _kernel(squared: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """C (1 + r + r²/3) e^{−r} with r = √5 d/ℓ, for one (log C, log ℓ) or a stack of them."""
    constant, scale = np.exp(hyper[..., 0])[..., None, None], np.exp(hyper[..., 1])[..., None, None]
    value = matern(np.sqrt(5 * squared) / scale, constant)
    return value if hyper.ndim > 1 else value.reshape(squared.shape)
