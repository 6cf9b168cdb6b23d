"""Choosing the next recipe: a function of configuration and history alone, so that any search can be resumed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.history import Evaluation, usable
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.execute import Executor, Subset
from tokencredit.recipes.program.recipe import Recipe, make_recipe, make_step
from tokencredit.recipes.program.state import State, StateReader, feature_vector
from tokencredit.recipes.search.config import SearchConfig
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


class Choice(NamedTuple):
    """The candidate to pay for, and all that were considered."""

    candidate: Candidate
    considered: Sequence[Candidate] = ()


Anchor = tuple[Recipe, int | None]  # a recipe to edit, and its slot where it was evaluated


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
        candidate = Candidate(recipe=recipe, subset=None, state={}, kind=kind, parent=parent)
        try:
            subset = self.executor.run(recipe)
        except TokenCreditError as error:
            return replace(candidate, why=error.message)
        state = self.reader.read(subset.positions)
        return replace(candidate, subset=subset, state=state, why=self._reject(subset, state))

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

    def edits(self, anchors: Sequence[Anchor], count: int, rng: np.random.Generator) -> list[Candidate]:
        """`count` edits of the anchors in turn; one tightens and one relaxes, whatever the dice say."""
        signs = [-1, 1] + [0] * (count - 2)
        turns = [(*anchors[number % len(anchors)], sign) for number, sign in enumerate(signs[:count])]
        return [self.materialise(edit(r, self.space, rng, sign), parent=parent) for r, parent, sign in turns]

    def programs(self, recipes: Sequence[Recipe]) -> np.ndarray:
        """ψ of recipes, [n, axes]."""
        order, ranges = operator_order(self.space), {"k": self.space.samples}
        return np.stack([operator_vector(recipe, order, ranges) for recipe in recipes])

    def vectors(self, points: Sequence[Evaluation | Candidate]) -> tuple[np.ndarray, list[str]]:
        """Inputs of the surrogate, [n, D], with the group of each column."""
        rows, groups = zip(*(feature_vector(point.state) for point in points), strict=True)
        table, labels = np.stack(rows), list(groups[0])
        if "program" in self.config.search.inputs:
            psi = self.programs([point.recipe for point in points])
            table, labels = np.concatenate([table, psi], axis=1), labels + ["program"] * psi.shape[1]
        return table, labels

    def posterior(self, history: Sequence[Evaluation]) -> np.ndarray:
        """Posterior means at the evaluated points, from the history alone; kept, for a history only grows."""
        key = tuple(evaluation.slot for evaluation in history)
        if key not in self._posteriors:
            table, groups = self.vectors(history)
            inputs, _ = standardise(table, table[:0])
            self._posteriors[key] = self.fit(inputs, groups, history).predict(inputs)[0]
        return self._posteriors[key]

    def fit(self, inputs: np.ndarray, groups: Sequence[str], history: Sequence[Evaluation]) -> Surrogate:
        scores = np.array([evaluation.score for evaluation in history], dtype=np.float64)
        return fit(inputs, groups, scores, noise_sd=self.config.noise_sd)


def choose_default(chooser: Chooser, history: Sequence[Evaluation]) -> Choice:
    """Warm-up over token ratios, a size control, then the best of 48 candidates by expected improvement."""
    settings, slot = chooser.config.search, len(history) + 1
    if slot <= settings.warmup:
        return Choice(warm_up(chooser, slot))
    good = usable(history)
    if settings.control and slot == settings.warmup + 1:
        return Choice(control(chooser, good))
    if not good:
        return Choice(fresh(chooser, slot))
    candidates = propose(chooser, history)
    open_candidates = [candidate for candidate in candidates if not candidate.why]
    if not open_candidates:
        return Choice(fresh(chooser, slot), candidates)
    return choose_best(chooser, history, candidates, score(chooser, good, open_candidates))


def choose_best(
    chooser: Chooser, history: Sequence[Evaluation], candidates: Sequence[Candidate], scored: Sequence[Candidate]
) -> Choice:
    """The scored candidate that the ranker prefers; rejected candidates are kept in what was considered."""
    best = scored[rank(chooser, history, scored)]
    return Choice(best, [candidate for candidate in candidates if candidate.why] + list(scored))


def warm_up(chooser: Chooser, slot: int) -> Candidate:
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
        raise _no_recipe(candidate, "lower search.min_samples or search.min_token_ratio")
    return nearest


def _no_recipe(last: Candidate, hint: str) -> TokenCreditError:
    return TokenCreditError(
        f"none of {BIN_DRAWS} random recipes may be evaluated; the last was rejected: {last.why}", hint=hint
    )


def control(chooser: Chooser, good: Sequence[Evaluation]) -> Candidate:
    """`random_k` alone with the tokens of the best warm-up: what size by itself is worth."""
    best = max(good, key=lambda evaluation: evaluation.value, default=None)
    ratio = best.state["token_ratio"] if best else 0.5
    k = max(1, round(ratio * chooser.space.samples))
    return chooser.materialise(make_recipe([make_step("random_k", k=k, seed=chooser.space.seed)]), kind="control")


def fresh(chooser: Chooser, slot: int, *, single: bool = False) -> Candidate:
    """The first random program that may be evaluated; with `single`, of one step."""
    rng, space = chooser.rng("fresh", slot), chooser.space
    for _ in range(BIN_DRAWS):
        if single:
            program = make_recipe([random_step(str(rng.choice(space.operators)), space, rng)])
        else:
            program = random_program(space, rng)
        candidate = chooser.materialise(program)
        if not candidate.why:
            return candidate
    raise _no_recipe(candidate, "lower search.min_samples or search.min_token_ratio, or allow more operators")


def propose(chooser: Chooser, history: Sequence[Evaluation]) -> list[Candidate]:
    """Half fresh random programs, half edits of the three recipes with the highest posterior mean."""
    rng = chooser.rng("propose", len(history) + 1)
    anchors = edit_anchors(chooser, history)
    total = chooser.config.search.candidates
    candidates = [chooser.materialise(random_program(chooser.space, rng)) for _ in range(total // 2)]
    return candidates + chooser.edits(anchors, total - len(candidates), rng)


def edit_anchors(chooser: Chooser, history: Sequence[Evaluation]) -> list[Anchor]:
    """The recipes to edit; after `patience` runs without a new leader the last is replaced by a reseeded motif."""
    good = usable(history)
    order = np.argsort(-chooser.posterior(good), kind="stable")[:PARENTS]
    anchors: list[Anchor] = [(good[i].recipe, good[i].slot) for i in order.tolist()]
    if history[-1].reseed:
        anchors[-1] = (reseeded_motif(chooser, good, len(history) + 1), None)
    return anchors


def reseeded_motif(chooser: Chooser, good: Sequence[Evaluation], slot: int) -> Recipe:
    """A recipe built from the credit of past edits."""
    scores = [(evaluation.recipe, evaluation.value) for evaluation in good]
    return reseed(scores, transitions_of(good), chooser.space, chooser.rng("reseed", slot))


def transitions_of(good: Sequence[Evaluation]) -> list[tuple[Recipe, Recipe, float]]:
    """(parent, child, change of score) of every run that came from an edit."""
    by_slot = {evaluation.slot: evaluation for evaluation in good}
    edits = [(by_slot[e.parent], e) for e in good if e.parent in by_slot]
    return [(parent.recipe, child.recipe, child.value - parent.value) for parent, child in edits]


def score(chooser: Chooser, good: Sequence[Evaluation], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mean and standard deviation of the surrogate at each candidate."""
    table, groups = chooser.vectors([*good, *candidates])
    known, points = standardise(table[: len(good)], table[len(good) :])
    return with_forecasts(candidates, *chooser.fit(known, groups, good).predict(points))


def with_forecasts(candidates: Sequence[Candidate], mean: np.ndarray, sd: np.ndarray) -> list[Candidate]:
    """The candidates with their forecasts."""
    return [replace(c, mean=float(m), sd=float(s)) for c, m, s in zip(candidates, mean, sd, strict=True)]


def improvements(chooser: Chooser, good: Sequence[Evaluation], scored: Sequence[Candidate]) -> np.ndarray:
    """Log expected improvement of each candidate over the incumbent.

    The incumbent is the largest posterior mean at an evaluated point, never the largest score: the latter is inflated
    by luck.
    """
    mean, sd = _forecasts(scored)
    return log_expected_improvement(mean, sd, float(chooser.posterior(good).max()))


def _forecasts(scored: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
    mean = np.array([candidate.mean for candidate in scored], dtype=np.float64)
    return mean, np.array([candidate.sd for candidate in scored], dtype=np.float64)


def rank(chooser: Chooser, history: Sequence[Evaluation], scored: Sequence[Candidate]) -> int:
    """Index of the candidate to pay for, by `search.ranker`."""
    mean, sd = _forecasts(scored)
    ranker = chooser.config.search.ranker
    if ranker == "ucb":
        return int(np.argmax(mean + 1.5 * sd))
    if ranker == "thompson":
        return int(np.argmax(mean + sd * chooser.rng("thompson", len(history) + 1).standard_normal(len(mean))))
    return int(np.argmax(improvements(chooser, usable(history), scored)))


def choose_random(chooser: Chooser, history: Sequence[Evaluation]) -> Choice:
    """A random program in every slot."""
    return Choice(fresh(chooser, len(history) + 1))


def choose_single(chooser: Chooser, history: Sequence[Evaluation]) -> Choice:
    """A recipe of length one in every slot."""
    return Choice(fresh(chooser, len(history) + 1, single=True))


def reseed_due(leaders: Sequence[Any], patience: int) -> bool:
    """Whether the last `patience` entries brought no new leader since the last change or the last reseed.

    `leaders` is the leader after each run; a tie is no change. The count starts again after it has been due.
    """
    count = 0
    for before, after in pairwise(leaders):
        count = 0 if after != before else count % patience + 1
    return count == patience
