"""The search of the paper (arXiv:2605.12944), without its language model: edits of one anchor, UCB on programs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from tokencredit.recipes.program.recipe import Recipe, Step, make_recipe, make_step
from tokencredit.recipes.search.history import Evaluation, usable
from tokencredit.recipes.search.policies import (
    Candidate,
    Chooser,
    fresh,
    rank,
    reseed_due,
    scores_of,
    transitions_of,
)
from tokencredit.recipes.search.propose import Space, edit, operator_order, operator_vector, reseed

# The paper names bins and gives no edges; these are the aims of the released code.
AIMS = ((0.05, 0.15), (0.30, 0.50), (0.60, 0.70))
ALPHA = 0.01  # noise variance on standardised scores, released code


def choose_paper(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> tuple[Candidate, list[Candidate]]:
    """Warm-up recipes at three retentions, then edits of the anchor, ranked by UCB of a process on ψ.

    The anchor starts as the best warm-up. With `anchor: seed` (the paper) it stays until it is reseeded, with
    `anchor: incumbent` (the released code) it follows the best score. A reseeded anchor costs no evaluation.
    """
    settings = chooser.config.search
    if slot <= settings.warmup:
        recipe = warm_up_recipe(chooser.space, AIMS[(slot - 1) % len(AIMS)], chooser.rng("paper warm-up", slot))
        candidate = chooser.materialise(recipe, kind="warm-up")
        return (candidate, []) if not candidate.why else (fresh(chooser, slot), [candidate])
    good = usable(history)
    if not good:
        return fresh(chooser, slot), []
    anchor, parent = anchor_of(chooser, history)
    rng = chooser.rng("paper propose", slot)
    candidates = []
    for number in range(settings.candidates):
        sign = (-1, 1)[number] if number < 2 else 0
        candidates.append(chooser.materialise(edit(anchor, chooser.space, rng, sign), parent=parent))
    open_candidates = [candidate for candidate in candidates if not candidate.why]
    if not open_candidates:
        return fresh(chooser, slot), candidates
    scored = score_programs(chooser, good, open_candidates)
    return scored[rank(chooser, slot, good, scored)], [c for c in candidates if c.why] + scored


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


def anchor_of(chooser: Chooser, history: Sequence[Evaluation]) -> tuple[Recipe, int | None]:
    """The recipe that is edited next, and its slot where it was evaluated."""
    settings = chooser.config.search
    good = usable(history)
    reseeded = [evaluation.slot for evaluation in history if evaluation.reseed]
    if reseeded:
        until = [evaluation for evaluation in good if evaluation.slot <= reseeded[-1]]
        rng = chooser.rng("reseed", reseeded[-1])
        motif = reseed(scores_of(until), transitions_of(until), chooser.space, rng)
        return motif, None
    base = [e for e in good if e.slot <= settings.warmup] if settings.anchor == "seed" else good
    best = max(base or good, key=lambda evaluation: evaluation.score or 0.0)
    return best.recipe, best.slot


def best_so_far(history: Sequence[Evaluation]) -> list[int | None]:
    """The slot of the highest score after each run; a tie is no improvement."""
    leader, leaders = None, []
    score = -np.inf
    for evaluation in history:
        if evaluation.ok and (evaluation.score or 0.0) > score:
            leader, score = evaluation.slot, evaluation.score or 0.0
        leaders.append(leader)
    return leaders


def stagnated(history: Sequence[Evaluation], warmup: int, patience: int) -> bool:
    """Whether `patience` runs in a row, since the warm-up or the last reseed, brought no higher score."""
    return reseed_due(best_so_far(history)[max(warmup - 1, 0) :], patience)


def score_programs(chooser: Chooser, good: Sequence[Evaluation], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mean and sd from C · Matérn-5/2 with one length scale on ψ, noise variance .01 on standardised scores."""
    order = operator_order(chooser.space)
    ranges = {"k": chooser.space.samples}
    known = np.stack([operator_vector(evaluation.recipe, order, ranges) for evaluation in good])
    points = np.stack([operator_vector(candidate.recipe, order, ranges) for candidate in candidates])
    scores = np.array([evaluation.score for evaluation in good], dtype=np.float64)
    level, scale = float(scores.mean()), float(scores.std()) or 1.0
    mean, sd = matern_posterior(known, (scores - level) / scale, points)
    return [
        replace(candidate, mean=level + scale * float(m), sd=scale * float(s))
        for candidate, m, s in zip(candidates, mean, sd, strict=True)
    ]


def matern_posterior(known: np.ndarray, scores: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum-likelihood constant and length scale in [.01, 100], on a grid that is refined twice.

    Two parameters need no restarts: the grid sees every basin, and is the same on every machine.
    """
    squared = ((known[:, None] - known[None]) ** 2).sum(2)
    centre, reach = np.array([0.0, 0.0]), np.array([np.log(1e3), np.log(100.0)])
    for _ in range(3):
        axes = [np.linspace(c - r, c + r, 17) for c, r in zip(centre, reach, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        centre = grid[np.argmin(_losses(squared, scores, grid))]
        reach = reach / 8
    factor = cho_factor(_matern(squared, centre) + ALPHA * np.eye(len(scores)), lower=True)
    cross = _matern(((points[:, None] - known[None]) ** 2).sum(2), centre)
    variance = np.exp(centre[0]) - (cross * cho_solve(factor, cross.T).T).sum(1)
    return cross @ cho_solve(factor, scores), np.sqrt(np.maximum(variance, 1e-12))


def _losses(squared: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each (log C, log ℓ), [grid]."""
    factor = np.linalg.cholesky(_matern(squared, grid) + ALPHA * np.eye(len(scores)))
    solved = np.linalg.solve(factor, np.broadcast_to(scores, (len(grid), len(scores)))[..., None])[..., 0]
    return 0.5 * (solved**2).sum(1) + np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)


def _matern(squared: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """C (1 + r + r²/3) e^{−r} with r = √5 d/ℓ, for one (log C, log ℓ) or a stack of them."""
    constant, scale = np.exp(hyper[..., 0])[..., None, None], np.exp(hyper[..., 1])[..., None, None]
    radius = np.sqrt(5 * squared) / scale
    value = constant * (1 + radius + radius**2 / 3) * np.exp(-radius)
    return value if hyper.ndim > 1 else value.reshape(squared.shape)
