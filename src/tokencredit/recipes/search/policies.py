"""Choosing the next recipe: a function of configuration and history alone, so that any search can be resumed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.execute import Executor, Subset
from tokencredit.recipes.program.recipe import Recipe, make_recipe, make_step
from tokencredit.recipes.program.state import State, StateReader, feature_vector
from tokencredit.recipes.search.config import SearchConfig
from tokencredit.recipes.search.history import Evaluation, usable
from tokencredit.recipes.search.propose import (
    Space,
    edit,
    operator_order,
    operator_vector,
    random_program,
    random_step,
    reseed,
)
from tokencredit.recipes.search.surrogate import Surrogate, fit, log_expected_improvement, standardise
from tokencredit.seeds import derive

BINS = ((0.15, 0.30), (0.30, 0.60), (0.60, 0.90))  # realised token ratio of the warm-up
BIN_DRAWS = 400
SAME = 0.98  # Jaccard similarity from which a candidate is the evaluated subset again
PARENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A materialised recipe. `why` is the reason of its rejection, empty where it may be evaluated."""

    recipe: Recipe
    subset: Subset | None
    state: State
    kind: str = "search"
    parent: int | None = None
    why: str = ""
    mean: float | None = None
    sd: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Chooser:
    """What all policies share: materials, space, configuration, and the subsets that were paid for."""

    config: SearchConfig
    executor: Executor
    reader: StateReader
    space: Space
    seen: dict[str, Positions] = field(default_factory=dict)
    _posteriors: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def rng(self, purpose: str, *index: int) -> np.random.Generator:
        return np.random.default_rng(derive("recipes", self.config.search.seed, purpose, *index))

    def materialise(self, recipe: Recipe, kind: str = "search", parent: int | None = None) -> Candidate:
        """Execute and describe a recipe, and say why it may not be evaluated, if so."""
        try:
            subset = self.executor.run(recipe)
        except TokenCreditError as error:
            return Candidate(recipe=recipe, subset=None, state={}, kind=kind, parent=parent, why=error.message)
        state = self.reader.read(subset.positions)
        why = self._reject(subset, state)
        return Candidate(recipe=recipe, subset=subset, state=state, kind=kind, parent=parent, why=why)

    def _reject(self, subset: Subset, state: State) -> str:
        settings = self.config.search
        if len(subset) < settings.min_samples:
            return f"{len(subset)} samples, floor {settings.min_samples}"
        if state["token_ratio"] < settings.min_token_ratio:
            return f"token ratio {state['token_ratio']:.3f}, floor {settings.min_token_ratio}"
        if subset.hash in self.seen:
            return "already evaluated"
        inside = np.zeros(len(self.executor.materials.pool), bool)
        inside[subset.positions] = True
        for positions in self.seen.values():
            shared = int(inside[positions].sum())
            if shared / (len(subset) + len(positions) - shared) > SAME:
                return f"Jaccard above {SAME} with an evaluated subset"
        return ""

    def vectors(self, states: Sequence[State], recipes: Sequence[Recipe]) -> tuple[np.ndarray, list[str]]:
        """Inputs of the surrogate, [n, D], with the group of each column."""
        rows, groups = zip(*(feature_vector(state) for state in states), strict=True)
        table, labels = np.stack(rows), list(groups[0])
        if "program" in self.config.search.inputs:
            order = operator_order(self.space)
            psi = np.stack([operator_vector(recipe, order, {"k": self.space.samples}) for recipe in recipes])
            table, labels = np.concatenate([table, psi], axis=1), labels + ["program"] * psi.shape[1]
        return table, labels

    def posterior(self, history: Sequence[Evaluation]) -> np.ndarray:
        """Posterior means at the evaluated points, from the history alone; kept, for a history only grows."""
        key = tuple(evaluation.slot for evaluation in history)
        if key not in self._posteriors:
            self._posteriors[key] = self._posterior(history)
        return self._posteriors[key]

    def _posterior(self, history: Sequence[Evaluation]) -> np.ndarray:
        table, groups = self.vectors([e.state for e in history], [e.recipe for e in history])
        inputs, _ = standardise(table, table[:0])
        return self.fit(inputs, groups, history).predict(inputs)[0]

    def fit(self, inputs: np.ndarray, groups: Sequence[str], history: Sequence[Evaluation]) -> Surrogate:
        scores = np.array([evaluation.score for evaluation in history], dtype=np.float64)
        return fit(inputs, groups, scores, noise_sd=self.config.noise_sd)


def choose_default(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> tuple[Candidate, list[Candidate]]:
    """Warm-up over token ratios, a size control, then the best of 48 candidates by expected improvement."""
    settings = chooser.config.search
    if slot <= settings.warmup:
        return warm_up(chooser, slot)
    good = usable(history)
    if settings.control and slot == settings.warmup + 1:
        return control(chooser, good), []
    if not good:
        return fresh(chooser, slot), []
    candidates = propose(chooser, slot, history)
    open_candidates = [candidate for candidate in candidates if not candidate.why]
    if not open_candidates:
        return fresh(chooser, slot), candidates
    scored = score(chooser, good, open_candidates)
    return scored[rank(chooser, slot, good, scored)], [c for c in candidates if c.why] + scored


def warm_up(chooser: Chooser, slot: int) -> tuple[Candidate, list[Candidate]]:
    """A random program whose realised token ratio lies in the slot's bin; after 400 draws the nearest one."""
    low, high = BINS[(slot - 1) % len(BINS)]
    rng = chooser.rng("warm-up", slot)
    nearest, distance = None, np.inf
    for _ in range(BIN_DRAWS):
        candidate = chooser.materialise(random_program(chooser.space, rng), kind="warm-up")
        if candidate.why:
            continue
        ratio = candidate.state["token_ratio"]
        away = max(low - ratio, ratio - high, 0.0)
        if away < distance:
            nearest, distance = candidate, away
        if away == 0:
            break
    if nearest is None:
        raise TokenCreditError(
            f"none of {BIN_DRAWS} random recipes may be evaluated; the last was rejected: {candidate.why}",
            hint="lower search.min_samples or search.min_token_ratio",
        )
    return nearest, []


def control(chooser: Chooser, good: Sequence[Evaluation]) -> Candidate:
    """`random_k` alone with the tokens of the best warm-up: what size by itself is worth."""
    best = max(good, key=lambda evaluation: evaluation.score or 0.0) if good else None
    ratio = best.state["token_ratio"] if best else 0.5
    k = max(1, round(ratio * chooser.space.samples))
    return chooser.materialise(make_recipe([make_step("random_k", k=k, seed=chooser.space.seed)]), kind="control")


def fresh(chooser: Chooser, slot: int, steps: tuple[int, int] = (2, 4)) -> Candidate:
    """The first random program that may be evaluated."""
    rng = chooser.rng("fresh", slot)
    for _ in range(BIN_DRAWS):
        program = (
            make_recipe([random_step(str(rng.choice(chooser.space.operators)), chooser.space, rng)])
            if steps == (1, 1)
            else random_program(chooser.space, rng, steps)
        )
        candidate = chooser.materialise(program)
        if not candidate.why:
            return candidate
    raise TokenCreditError(
        f"none of {BIN_DRAWS} random recipes may be evaluated; the last was rejected: {candidate.why}",
        hint="lower search.min_samples or search.min_token_ratio, or allow more operators",
    )


def propose(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> list[Candidate]:
    """Half fresh random programs, half edits of the three recipes with the highest posterior mean."""
    settings = chooser.config.search
    rng = chooser.rng("propose", slot)
    anchors = edit_anchors(chooser, slot, history)
    candidates = [chooser.materialise(random_program(chooser.space, rng)) for _ in range(settings.candidates // 2)]
    for number in range(settings.candidates - len(candidates)):
        recipe, parent = anchors[number % len(anchors)]
        sign = (-1, 1)[number] if number < 2 else 0  # one tightens and one relaxes, whatever the dice say
        candidates.append(chooser.materialise(edit(recipe, chooser.space, rng, sign), parent=parent))
    return candidates


def edit_anchors(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> list[tuple[Recipe, int | None]]:
    """The recipes to edit; after `patience` runs without a new leader the last is replaced by a reseeded motif."""
    good = usable(history)
    order = np.argsort(-chooser.posterior(good), kind="stable")[:PARENTS]
    anchors: list[tuple[Recipe, int | None]] = [(good[i].recipe, good[i].slot) for i in order.tolist()]
    if history[-1].reseed:
        motif = reseed(scores_of(good), transitions_of(good), chooser.space, chooser.rng("reseed", slot))
        anchors[-1] = (motif, None)
    return anchors


def scores_of(good: Sequence[Evaluation]) -> list[tuple[Recipe, float]]:
    """Recipes with their scores."""
    return [(evaluation.recipe, evaluation.score or 0.0) for evaluation in good]


def transitions_of(good: Sequence[Evaluation]) -> list[tuple[Recipe, Recipe, float]]:
    """(parent, child, change of score) of every run that came from an edit."""
    by_slot = {evaluation.slot: evaluation for evaluation in good}
    return [
        (by_slot[e.parent].recipe, e.recipe, (e.score or 0.0) - (by_slot[e.parent].score or 0.0))
        for e in good
        if e.parent in by_slot
    ]


def score(chooser: Chooser, good: Sequence[Evaluation], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mean and standard deviation of the surrogate at each candidate."""
    states = [e.state for e in good] + [c.state for c in candidates]
    table, groups = chooser.vectors(states, [e.recipe for e in good] + [c.recipe for c in candidates])
    known, points = standardise(table[: len(good)], table[len(good) :])
    mean, sd = chooser.fit(known, groups, good).predict(points)
    return [replace(c, mean=float(m), sd=float(s)) for c, m, s in zip(candidates, mean, sd, strict=True)]


def rank(chooser: Chooser, slot: int, good: Sequence[Evaluation], scored: Sequence[Candidate]) -> int:
    """Index of the candidate to pay for.

    The incumbent of the expected improvement is the largest posterior mean at an evaluated point, never the largest
    score: the latter is inflated by luck.
    """
    mean = np.array([candidate.mean for candidate in scored], dtype=np.float64)
    sd = np.array([candidate.sd for candidate in scored], dtype=np.float64)
    ranker = chooser.config.search.ranker
    if ranker == "ucb":
        return int(np.argmax(mean + 1.5 * sd))
    if ranker == "thompson":
        return int(np.argmax(mean + sd * chooser.rng("thompson", slot).standard_normal(len(mean))))
    return int(np.argmax(log_expected_improvement(mean, sd, float(chooser.posterior(good).max()))))


def choose_random(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> tuple[Candidate, list[Candidate]]:
    """A random program in every slot."""
    return fresh(chooser, slot), []


def choose_single(chooser: Chooser, slot: int, history: Sequence[Evaluation]) -> tuple[Candidate, list[Candidate]]:
    """A recipe of length one in every slot."""
    return fresh(chooser, slot, steps=(1, 1)), []


def reseed_due(leaders: Sequence[Any], patience: int) -> bool:
    """Whether the last `patience` entries brought no new leader since the last change or the last reseed.

    `leaders` is the leader after each run; a tie is no change. The count starts again after it has been due.
    """
    count = 0
    for before, after in pairwise(leaders):
        count = 0 if after != before else count + 1
        if count == patience:
            due, count = True, 0
        else:
            due = False
    return len(leaders) > 1 and due
