"""Telling luck from gain: fresh seeds on fresh problems for the finalist and its controls, with honest intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokencredit.diagnostics.stats import seed_interval
from tokencredit.errors import TokenCreditError
from tokencredit.files import write_json
from tokencredit.progress import bar
from tokencredit.recipes.evaluate.history import Evaluation, usable
from tokencredit.recipes.pool.lines import append, read_log
from tokencredit.recipes.program.execute import Subset
from tokencredit.recipes.program.recipe import Recipe, as_mappings, make_recipe, make_step
from tokencredit.recipes.search.loop import Search
from tokencredit.recipes.search.objective import Objective
from tokencredit.recipes.search.policies import score
from tokencredit.seeds import derive

CONFIRM = "confirm.jsonl"
DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A fixed recipe; or, without one, a random draw with the tokens of the finalist, drawn anew for every seed."""

    name: str
    recipe: Recipe | None
    tokens: int = 0
    redraw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Confirmation:
    """Scores in points, [seeds] for each arm, and the items that they come from where the evaluator reports them."""

    runs: Mapping[str, list[dict[str, Any]]]
    objective: Objective

    def scores(self) -> dict[str, list[float]]:
        return {arm: [run["score"] for run in runs if run["status"] == "ok"] for arm, runs in self.runs.items()}

    def items(self, arm: str) -> list[dict[tuple[str, str], float]]:
        finished = [run["items"] for run in self.runs[arm] if run["status"] == "ok"]
        return [{(task, item): score for task, item, score in items} for items in finished]

    @property
    def samples(self) -> dict[str, int]:
        return {arm: runs[0]["samples"] for arm, runs in self.runs.items() if runs}


def standard_arms(search: Search) -> list[Arm]:
    """Finalist, runner-up and the controls that the configuration names."""
    settings = search.config.confirm
    finalists = search.finalists(settings.finalists)
    names = ["finalist", "runner-up", *(f"finalist {number}" for number in range(3, len(finalists) + 1))]
    arms = [Arm(name=name, recipe=f.recipe, redraw=settings.redraw) for name, f in zip(names, finalists, strict=False)]
    for control in settings.controls:
        if control == "random_k_tokens":
            arms.append(Arm(name="random, equal tokens", recipe=None, tokens=finalists[0].tokens))
        elif control == "full":
            arms.append(Arm(name="full data", recipe=make_recipe([])))
        else:
            arms.append(_best_single(search, finalists[0]))
    return arms


def _best_single(search: Search, finalist: Evaluation) -> Arm:
    """The best recipe of length one that was evaluated; else the finalist's operator with the best forecast by itself.

    Raises:
      TokenCreditError: no recipe of length one can be run.
    """
    singles = [e for e in usable(search.history) if len(e.steps) == 1 and e.kind != "control"]
    if singles:
        best = max(singles, key=lambda evaluation: evaluation.value)
        return Arm(name="best single operator", recipe=best.recipe)
    steps = [make_recipe([step]) for step in finalist.recipe.steps]
    candidates = [candidate for candidate in map(search.chooser.materialise, steps) if candidate.subset is not None]
    if not candidates:
        raise TokenCreditError(
            "the control 'best_single' needs a recipe of length one, and this search has none that runs",
            hint="leave it out of `confirm.controls`, or search with --policy single",
        )
    good = usable(search.history)
    if len(candidates) > 1 and len(good) > 1:
        forecast = score(search.chooser, good, candidates)
        candidates = sorted(forecast, key=lambda candidate: -(candidate.mean or 0.0))
    return Arm(name="best single operator, by forecast", recipe=candidates[0].recipe)


def confirm_arms(search: Search, arms: Sequence[Arm], seeds: int, split: str = "confirm") -> Confirmation:
    """Pay for `seeds` fresh runs of every arm; finished ones are read from `confirm.jsonl`."""
    path = search.folder / CONFIRM
    done = {(line["arm"], line["subset_hash"], line["seed"], line["split"]): line for line in read_log(path)}
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    with bar("confirm", len(arms) * seeds) as advance:
        for number in range(seeds):  # seed by seed, so that a stopped confirmation is balanced
            for arm in arms:
                seed = derive("recipes", search.config.search.seed, "confirm", number) % 2**31
                subset = _subset_of(search, arm, seed)
                key = (arm.name, subset.hash, seed, split)
                if key not in done:
                    facts = dict(zip(("arm", "subset_hash", "seed", "split"), key, strict=True))
                    done[key] = facts | _pay(search, arm, subset, seed, split)
                    append(path, json.dumps(done[key], allow_nan=False).encode() + b"\n")
                runs[arm.name].append(done[key])
                advance(1, arm.name)
    return Confirmation(runs=runs, objective=search.objective)


def _subset_of(search: Search, arm: Arm, seed: int) -> Subset:
    pool, recipe = search.materials.pool, arm.recipe
    if recipe is None:
        k = max(1, round(arm.tokens / float(pool.words.sum()) * len(pool)))
        recipe = make_recipe([make_step("random_k", k=k, seed=seed)])
    elif arm.redraw:
        recipe = make_recipe([{**step, "seed": seed} if "seed" in step else step for step in as_mappings(recipe)])
    return search.chooser.executor.run(recipe)


def _pay(search: Search, arm: Arm, subset: Subset, seed: int, split: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"samples": len(subset), "tokens": search.tokens_of(subset.positions)}
    facts["recipe"] = as_mappings(arm.recipe) if arm.recipe is not None else None
    recipe = str(arm.recipe) if arm.recipe is not None else arm.name
    return facts | search.pay(subset.positions, subset.hash, seed, split, recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Finalist minus a control, in points, with the wider of two 95 % intervals."""

    control: str
    mean: float
    low: float
    high: float
    method: str
    seeds: tuple[int, int]

    @property
    def confirmed(self) -> bool:
        return self.low > 0


def differences(result: Confirmation, arm: str = "finalist") -> list[Difference]:
    """`arm` against every other arm; the arm was fixed before the confirmation, so nothing is chosen here."""
    scores = result.scores()
    return [
        difference(result, arm, other)
        for other in scores
        if other != arm and min(len(scores[arm]), len(scores[other])) > 1
    ]


def difference(result: Confirmation, arm: str, control: str) -> Difference:
    """Welch's t interval over seeds, and a bootstrap over seeds and then items paired across recipes: the wider."""
    a, b = (np.array(result.scores()[name]) for name in (arm, control))
    mean = float(a.mean() - b.mean())
    half = welch_half_width(a, b)
    low, high, method = mean - half, mean + half, "t over seeds"
    resampled = bootstrap(result, arm, control)
    if resampled is not None and resampled[1] - resampled[0] > high - low:
        (low, high), method = resampled, "bootstrap over seeds and items"
    return Difference(control=control, mean=mean, low=low, high=high, method=method, seeds=(len(a), len(b)))


def welch_half_width(a: np.ndarray, b: np.ndarray) -> float:
    """Half the width of a 95 % interval of mean(a) − mean(b), variances unequal."""
    from scipy.stats import ttest_ind

    if a.var() + b.var() == 0:
        return 0.0
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return float(interval.high - interval.low) / 2


def bootstrap(result: Confirmation, arm: str, control: str) -> tuple[float, float] | None:
    """Percentile interval of the difference over 10,000 draws; None where the evaluator reports no items."""
    left, right = result.items(arm), result.items(control)
    if not left or not right or not left[0]:
        return None
    keys = sorted(set.intersection(*(set(row) for row in [*left, *right])))
    a, b = (np.array([[row[key] for key in keys] for row in rows]) for rows in (left, right))
    weights = result.objective.item_weights(sorted({task for task, _ in keys}))
    rng = np.random.default_rng(derive("confirm", "bootstrap", arm, control))
    seeds_a = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), DRAWS) / len(a)
    seeds_b = rng.multinomial(len(b), np.full(len(b), 1 / len(b)), DRAWS) / len(b)
    tasks = np.array([task for task, _ in keys])
    total = np.zeros(DRAWS)
    for task in np.unique(tasks):
        of_task = np.flatnonzero(tasks == task)
        n = len(of_task)
        per_item = seeds_a @ a[:, of_task] - seeds_b @ b[:, of_task]  # [draws, items]
        counts = rng.multinomial(n, np.full(n, 1 / n), DRAWS)
        total += weights[task] * (per_item * counts).sum(1) / n
    return float(np.quantile(total, 0.025)), float(np.quantile(total, 0.975))


def expected_maximum(draws: int) -> float:
    """E max of standard normals, ∫ x n φ(x) Φ(x)^{n−1} dx: 1.736 for 15. What noise alone adds to the best score."""
    from scipy.stats import norm

    x = np.linspace(-8, 10, 20001)
    return float(np.trapezoid(x * draws * norm.pdf(x) * norm.cdf(x) ** (draws - 1), x))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunken:
    """The best observed score pulled towards the mean by what noise explains."""

    best: float
    mean: float
    estimate: float
    gain: float  # estimate − mean
    reliability: float  # σᵤ² / (σᵤ² + σ²), in [0, 1)


def shrunken(history: Sequence[Evaluation], noise_sd: float) -> Shrunken:
    """ȳ + σ̂ᵤ²/(σ̂ᵤ² + σ²) · (y_best − ȳ),  σ̂ᵤ² = max(0, s² − σ²), over the evaluations above the floors."""
    scores = np.array([e.score for e in usable(history) if not e.below_floor], dtype=np.float64)
    if len(scores) == 0:
        raise TokenCreditError("no evaluation of this search finished above the floors")
    spread = max(0.0, float(scores.var(ddof=1)) - noise_sd**2) if len(scores) > 1 else 0.0
    reliability = spread / (spread + noise_sd**2) if noise_sd else 1.0
    gain = reliability * float(scores.max() - scores.mean())
    best, mean = float(scores.max()), float(scores.mean())
    return Shrunken(best=best, mean=mean, estimate=mean + gain, gain=gain, reliability=reliability)


def seeds_needed(gap: float, sd: float, power: float = 0.8) -> int:
    """Seeds an arm so that a two-sample t test at 5 % finds a true gap with the given probability."""
    from scipy.stats import nct, t

    for seeds in range(2, 1000):
        freedom = 2 * seeds - 2
        limit = t.ppf(0.975, freedom)
        shift = gap / sd * np.sqrt(seeds / 2)
        if nct.sf(limit, freedom, shift) + nct.cdf(-limit, freedom, shift) >= power:
            return seeds
    return 1000


def half_width(seeds: int, sd: float) -> float:
    """Half the width of the 95 % interval that a confirmation will have."""
    from scipy.stats import t

    return float(t.ppf(0.975, 2 * seeds - 2) * sd * np.sqrt(2 / seeds))


def power_lines(sd: float, seeds: int) -> Iterator[str]:
    """What a confirmation can see, said before it is paid for."""
    yield f"noise {sd:g} points, {seeds} seeds an arm: 95 % interval ±{half_width(seeds, sd):.2f}"
    table = ", ".join(f"{seeds_needed(gap * sd, sd)} for a gap of {gap * sd:g}" for gap in (1.0, 2.0, 3.0, 4.0))
    yield f"seeds an arm for 80 % power: {table}"


def summary(search: Search, result: Confirmation) -> dict[str, Any]:
    """Raw maximum, shrunken estimate and confirmed mean side by side, and the verdict."""
    noise = search.config.noise_sd
    shrunk = shrunken(search.history, noise)
    compared = [asdict(d) | {"verdict": "confirmed" if d.confirmed else "not confirmed"} for d in differences(result)]
    mean, low, high = seed_interval(result.scores()["finalist"])
    return {
        "finalist": {"mean": mean, "low": low, "high": high, "seeds": len(result.scores()["finalist"])},
        "search": asdict(shrunk),
        "noise_sd": noise,
        "expected_maximum_of_noise": expected_maximum(len(usable(search.history))) * noise,
        "differences": compared,
        "arms": {arm: {"scores": scores, "samples": result.samples[arm]} for arm, scores in result.scores().items()},
    }


def save_summary(search: Search, result: Confirmation) -> dict[str, Any]:
    """Write the summary to `confirm.json`, whole or not at all, and return it."""
    content = summary(search, result)
    write_json(search.folder / "confirm.json", content)
    return content
