"""Random programs, edits of programs, and motifs rebuilt from the credit of past edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokencredit.recipes.program.recipe import Recipe, Step, diff, make_recipe, make_step
from tokencredit.recipes.search.config import SearchSettings
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.neardup import FLOOR

# Neither end of these is plainly the good one, so a search tries both directions.
TWO_SIDED = ("ppl", "loss", "el2n", "len.", "resid(")
TUNABLE = frozenset({"fraction", "k", "cosine", "jaccard", "low"})
STEPS = (0.03, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What programs may be made of: operators, signals of `top` and of `top_union`, and sizes."""

    samples: int
    operators: tuple[str, ...]
    scalars: tuple[str, ...]
    relevance: tuple[str, ...]
    seed: int  # of random_k, the same in every program: common random numbers
    clusters: int = 1000
    max_steps: int = 5


def make_space(materials: Materials, settings: SearchSettings, seed: int) -> Space:
    """The operators that these materials can serve."""
    relevance = tuple(sorted(name for name in materials.signals if name.startswith("rel.")))
    scalars = tuple(sorted(name for name in materials.signals if not name.startswith("rel.")))
    lacking = set()
    if not scalars:
        lacking |= {"top", "band"}
    if not relevance:
        lacking.add("top_union")
    if materials.make_graph is None:
        lacking.add("semdedup")
    if materials.make_shingles is None:
        lacking.add("minhash")
    return Space(
        samples=len(materials.pool),
        operators=tuple(name for name in settings.operators if name not in lacking),
        scalars=scalars,
        relevance=relevance,
        seed=seed,
        clusters=settings.clusters,
        max_steps=settings.max_steps,
    )


def random_step(op: str, space: Space, rng: np.random.Generator) -> Step:
    """A step with parameters from the ranges of the default search."""
    fraction = round(float(rng.uniform(0.3, 0.97)), 3)
    if op == "top":
        signal = str(rng.choice(space.scalars))
        flip = signal.startswith(TWO_SIDED) and rng.random() < 0.5
        return make_step("top", signal=signal, fraction=fraction, **({"descending": False} if flip else {}))
    if op == "band":
        low = round(float(rng.uniform(0.0, 0.4)), 3)
        return make_step("band", signal=str(rng.choice(space.scalars)), low=low, high=round(1 - low / 2, 3))
    if op == "top_union":
        return make_step("top_union", signals=list(space.relevance), fraction=fraction)
    if op == "semdedup":
        cosine = round(float(rng.uniform(FLOOR, 0.98)), 3)
        return make_step("semdedup", cosine=cosine, clusters=space.clusters)
    if op == "minhash":
        return make_step("minhash", jaccard=round(float(rng.uniform(0.5, 0.95)), 3))
    if op in {"random_k", "stratified_k"}:
        return make_step(op, k=max(1, round(float(rng.uniform(0.15, 0.95)) * space.samples)), seed=space.seed)
    return make_step(op)


def random_program(space: Space, rng: np.random.Generator) -> Recipe:
    """A program of two to four steps; only `top` and `band` may occur twice."""
    count = min(int(rng.integers(2, 5)), space.max_steps)
    made: list[Step] = []
    used: set[str] = set()
    while len(made) < count:
        free = [op for op in space.operators if op in {"top", "band"} or op not in used]
        if not free:
            break
        op = str(rng.choice(free))
        used.add(op)
        made.append(random_step(op, space, rng))
    return make_recipe(made)


def retune(step: Step, rng: np.random.Generator, sign: int = 0) -> Step:
    """Move one parameter by ±{.03, .05, .1, .2}: fractions fully, thresholds by half, k by the factor e^{±2·step}.

    `sign` −1 tightens and +1 relaxes; 0 draws the direction.
    """
    move = float(rng.choice(STEPS)) * (sign or int(rng.choice((-1, 1))))
    params = dict(step.params)
    if "fraction" in params:
        params["fraction"] = _clip(params["fraction"] + move, 0.05, 1.0)
    elif "k" in params:
        params["k"] = max(1, round(params["k"] * float(np.exp(2 * move))))
    elif "cosine" in params:
        params["cosine"] = _clip(params["cosine"] + move / 2, FLOOR, 0.99)
    elif "jaccard" in params:
        params["jaccard"] = _clip(params["jaccard"] + move / 2, 0.5, 0.99)
    elif "low" in params:
        params["low"] = _clip(params["low"] - move, 0.0, max(0.0, params["high"] - 0.05))
    return make_step(step.op, **params)


def _clip(value: float, low: float, high: float) -> float:
    return round(min(max(value, low), high), 4)


def edit(recipe: Recipe, space: Space, rng: np.random.Generator, sign: int = 0) -> Recipe:
    """Retune .5, insert .2, delete .15 or move .15, and a second edit with probability .3; a `sign` forces a retune."""
    steps = _edit_once(list(recipe.steps), space, rng, "retune" if sign else _kind(rng), sign)
    if not sign and rng.random() < 0.3:
        steps = _edit_once(steps, space, rng, _kind(rng), 0)
    return make_recipe(steps, parent=recipe.id)


def _kind(rng: np.random.Generator) -> str:
    return str(rng.choice(("retune", "insert", "delete", "move"), p=(0.5, 0.2, 0.15, 0.15)))


def _edit_once(steps: list[Step], space: Space, rng: np.random.Generator, kind: str, sign: int) -> list[Step]:
    if kind == "delete" and len(steps) > 1:
        del steps[int(rng.integers(len(steps)))]
    elif kind == "move" and len(steps) > 1:
        step = steps.pop(int(rng.integers(len(steps))))
        steps.insert(int(rng.integers(len(steps) + 1)), step)
    elif kind == "insert" and len(steps) < space.max_steps:
        step = random_step(str(rng.choice(space.operators)), space, rng)
        steps.insert(int(rng.integers(len(steps) + 1)), step)
    elif steps:
        tunable = [place for place, step in enumerate(steps) if TUNABLE & set(step.params)]
        if tunable:
            place = int(rng.choice(tunable))
            steps[place] = retune(steps[place], rng, sign)
    return steps


Transition = tuple[Recipe, Recipe, float]  # parent, child, y_child − y_parent


def credits(transitions: Sequence[Transition]) -> dict[tuple[str, int], float]:
    """Credit of (operator, position): added or retuned steps share Δ, removed ones share −Δ.

    Sums are means over the n transitions that touched the pair, shrunk by n/(n + 1).
    """
    totals: dict[tuple[str, int], list[float]] = {}
    for parent, child, delta in transitions:
        edits = diff(parent, child)
        gained = [(op, place) for kind, op, place in edits if kind in {"insert", "retune"}]
        lost = [(op, place) for kind, op, place in edits if kind == "delete"]
        for key in gained:
            totals.setdefault(key, []).append(delta / len(gained))
        for key in lost:
            totals.setdefault(key, []).append(-delta / len(lost))
    return {key: float(np.mean(values)) * len(values) / (len(values) + 1) for key, values in sorted(totals.items())}


def reseed(
    evaluated: Sequence[tuple[Recipe, float]],
    transitions: Sequence[Transition],
    space: Space,
    rng: np.random.Generator,
) -> Recipe:
    """One to three steps drawn by positive credit, parameters of past steps drawn by score, behind a fresh random_k.

    Without positive credit, operators are drawn by the mean score of the recipes that used them.
    """
    past: dict[str, list[tuple[Step, float]]] = {}
    for recipe, score in evaluated:
        for step in recipe.steps:
            if step.op not in {"random_k", "stratified_k", "mix"}:
                past.setdefault(step.op, []).append((step, score))
    if not past:
        return random_program(space, rng)
    by_operator: dict[str, float] = {}
    for (op, _), credit in credits(transitions).items():
        by_operator[op] = by_operator.get(op, 0.0) + max(credit, 0.0)
    names = sorted(past)
    weights = np.array([by_operator.get(name, 0.0) for name in names])
    if weights.sum() <= 0:
        weights = _softened(np.array([np.mean([score for _, score in past[name]]) for name in names]))
    count = min(int(rng.integers(1, 4)), int((weights > 0).sum()))
    chosen = rng.choice(len(names), count, replace=False, p=weights / weights.sum())
    steps = []
    for index in chosen:
        examples = past[names[index]]
        share = _softened(np.array([score for _, score in examples]))
        steps.append(examples[int(rng.choice(len(examples), p=share))][0])
    k = int(rng.integers(max(space.samples // 10, 1), space.samples + 1))
    return make_recipe([make_step("random_k", k=k, seed=space.seed), *steps][: space.max_steps])


def _softened(scores: np.ndarray) -> np.ndarray:
    """Shares that grow with the score and do not depend on its zero point."""
    shares = scores - scores.min() + max(float(np.ptp(scores)), 1e-9) / 4
    return shares / shares.sum()


def operator_vector(recipe: Recipe, order: Sequence[str], ranges: Mapping[str, Any] | None = None) -> np.ndarray:
    """ψ of the paper: per operator (on, normalised parameter), off as (0, 0); a repeated operator keeps its last.

    Fractions and thresholds enter as they are; `ranges` gives what k is divided by.
    """
    vector = np.zeros(2 * len(order))
    for step in recipe.steps:
        label = _label(step)
        if label in order:
            place = 2 * list(order).index(label)
            vector[place : place + 2] = (1.0, _parameter(step, ranges or {}))
    return vector


def _label(step: Step) -> str:
    return f"top:{step.params['signal']}" if step.op == "top" else step.op


def _parameter(step: Step, ranges: Mapping[str, Any]) -> float:
    for name in ("fraction", "cosine", "jaccard", "low"):
        if name in step.params:
            return float(step.params[name])
    return float(step.params["k"]) / float(ranges.get("k", 1)) if "k" in step.params else 1.0


def operator_order(space: Space) -> tuple[str, ...]:
    """The axes of ψ: one for each signal of `top`, one for every other operator."""
    tops = tuple(f"top:{name}" for name in space.scalars) if "top" in space.operators else ()
    return tops + tuple(op for op in space.operators if op != "top")
