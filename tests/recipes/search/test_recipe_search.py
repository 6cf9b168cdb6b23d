import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recipes_surfaces import SURFACES, SyntheticEvaluator, surface, synthetic_pool

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.confirm import (
    Arm,
    confirm_arms,
    differences,
    expected_maximum,
    half_width,
    save_summary,
    seeds_needed,
    shrunken,
    standard_arms,
)
from tokencredit.recipes.evaluate.history import HISTORY, Evaluation, load_history
from tokencredit.recipes.evaluate.records import EvaluationFailed, Metrics, Request, TaskScore
from tokencredit.recipes.evaluate.replay import ReplayEvaluator, replay_of
from tokencredit.recipes.report import build_report, report_lines
from tokencredit.recipes.search.config import make_config
from tokencredit.recipes.search.loop import Search
from tokencredit.recipes.search.objective import Objective
from tokencredit.recipes.search.paper import stagnated
from tokencredit.recipes.search.policies import reseed_due
from tokencredit.recipes.search.surrogate import fit, log_expected_improvement, standardise

POOL = synthetic_pool(600)


def config_of(**search):
    block = {"seed": 1, "budget": 8, "candidates": 4, "min_samples": 50, **search}
    content = {"pool": "p", "evaluator": {"kind": "synthetic"}, "objective": {"scale": 1.0}, "search": block}
    return make_config(content)


def search_of(folder: Path, *, name: str = "mono", evaluator=None, **search) -> Search:
    POOL.materials.evaluated.clear()
    return Search(
        config=config_of(**search),
        materials=POOL.materials,
        evaluator=evaluator or SyntheticEvaluator(pool=POOL, surface=surface(name)),
        folder=folder,
    )


def comparable(history: list[Evaluation]) -> list[Evaluation]:
    return [replace(evaluation, seconds=0.0) for evaluation in history]


class Killer:
    """Stops a search at the n-th run, before or after the money is spent."""

    key = "synthetic"

    def __init__(self, at: int, after: bool) -> None:
        self.inner = SyntheticEvaluator(pool=POOL, surface=surface("mono"))
        self.at, self.after, self.calls, self.paid = at, after, 0, []

    def __call__(self, request: Request) -> Metrics:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise KeyboardInterrupt
        metrics = self.inner(request)
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.paid.append((request.subset_hash, request.seed, request.split))
        return metrics


@pytest.mark.parametrize(
    ("policy", "budget", "kills"),
    [("default", 15, range(1, 16)), ("paper", 8, (2, 6))],
)
def test_a_search_killed_anywhere_resumes_to_the_same_history(
    tmp_path: Path, policy: str, budget: int, kills: Sequence[int]
) -> None:
    search = partial(search_of, policy=policy, budget=budget)
    whole = comparable(search(tmp_path / "whole").run())
    for at in kills:
        folder = tmp_path / f"killed-{at}"
        killer = Killer(at, after=at % 2 == 0)
        with pytest.raises(KeyboardInterrupt):
            search(folder, evaluator=killer).run()
        if at == 6:  # a kill while a line is written leaves a torn tail
            with (folder / HISTORY).open("ab") as file:
                file.write(b'{"slot": 6, "kin')
        again = Killer(99, after=False)
        assert comparable(search(folder, evaluator=again).run()) == whole
        assert len(killer.paid) + len(again.paid) == len({*killer.paid, *again.paid}) == budget
        slots = [json.loads(line)["slot"] for line in (folder / "candidates.jsonl").read_text().splitlines()]
        assert slots == sorted(slots)
        assert [
            json.loads(line)["slot"] for line in (tmp_path / "whole" / "candidates.jsonl").read_text().splitlines()
        ] == slots


def test_resume_refuses_another_pool(tmp_path: Path) -> None:
    search_of(tmp_path, budget=4).run()
    other = synthetic_pool(600, seed=9)
    search = Search(
        config=config_of(budget=5),
        materials=other.materials,
        evaluator=SyntheticEvaluator(pool=other, surface=surface("mono")),
        folder=tmp_path,
    )
    with pytest.raises(TokenCreditError, match="slot 1: its recipe now gives"):
        search.run()


def test_the_papers_policy_materialises_63_times(tmp_path: Path) -> None:
    search = search_of(tmp_path, policy="paper", budget=15, candidates=5, min_samples=1)
    search.run()
    assert search.chooser.executor.materialisations == 3 + 5 * 12


def test_default_slots(tmp_path: Path) -> None:
    history = search_of(tmp_path).run()
    assert [evaluation.kind for evaluation in history] == ["warm-up"] * 3 + ["control"] + ["search"] * 4
    ratios = [evaluation.state["token_ratio"] for evaluation in history[:3]]
    assert 0.15 <= ratios[0] < 0.30 <= ratios[1] < 0.60 <= ratios[2] <= 0.90
    best = max(history[:3], key=lambda evaluation: evaluation.score)
    assert history[3].state["token_ratio"] == pytest.approx(best.state["token_ratio"], abs=0.05)
    assert [step["op"] for step in history[3].steps] == ["random_k"]
    assert all(evaluation.mean is not None for evaluation in history[4:])
    assert len({evaluation.subset_hash for evaluation in history}) == 8


def test_stagnation() -> None:
    def history(*scores: float) -> list[Evaluation]:
        return [_evaluation(slot, float(score)) for slot, score in enumerate(scores, start=1)]

    # incumbent 40 from the warm-up; a tie is no improvement
    assert [stagnated(history(40, *tail), 1, 4) for tail in ([39, 40, 39], [39, 40, 39, 39], [39, 40, 39, 39, 39])] == [
        False,
        True,
        False,
    ]
    assert not stagnated(history(40, 39, 39, 39, 41), 1, 4)
    assert reseed_due([1, 1, 1, 1, 1], 4) and reseed_due([1] * 9, 4) and not reseed_due([1, 1, 1, 1, 2], 4)


def _evaluation(slot: int, score: float | None, **fields) -> Evaluation:
    base = {"kind": "search", "steps": [], "recipe_hash": "", "subset_hash": f"{slot}", "samples": 1, "tokens": 1}
    base |= {"seed": 1, "split": "search", "status": "ok" if score is not None else "failed", "score": score}
    return Evaluation(slot=slot, **{**base, **fields})


def test_a_reseed_changes_the_anchor_and_not_the_incumbent(tmp_path: Path) -> None:
    search = search_of(tmp_path, name="flat", policy="paper", budget=10, patience=2, anchor="incumbent")
    history = search.run()
    reseeded = [evaluation.slot for evaluation in history if evaluation.reseed]
    assert reseeded
    after = [evaluation for evaluation in history if evaluation.slot > reseeded[0]]
    assert after and all(evaluation.parent is None for evaluation in after)
    assert search.finalists(1)[0].score == max(evaluation.score for evaluation in history)


def test_failed_runs_cost_budget_and_teach_nothing(tmp_path: Path) -> None:
    class Flaky:
        key = "flaky"
        calls = 0

        def __call__(self, request: Request) -> Metrics:
            self.calls += 1
            if self.calls in {2, 6}:
                raise EvaluationFailed("out of memory")
            return Metrics(tasks={"t": TaskScore(score=40.0 + len(request.positions) / 600)})

    search = search_of(tmp_path, evaluator=Flaky())
    history = search.run()
    assert [evaluation.status for evaluation in history].count("failed") == 2
    assert history[1].reason == "out of memory" and history[1].score is None
    assert search.finalists(1)[0].ok
    assert "failed" in "\n".join(report_lines(build_report(search)))


def test_floor_and_chance() -> None:
    objective = Objective.read({"tasks": {"a": {"weight": 3}, "b": {"chance": 0.25, "floor": "control-1"}}})
    points = objective.points(Metrics(tasks={"a": TaskScore(score=0.5), "b": TaskScore(score=0.4)}))
    assert points == pytest.approx({"a": 50.0, "b": 20.0})  # (.4 − .25)/.75 = .2
    assert objective.total(points) == pytest.approx((3 * 50 + 20) / 4)
    assert objective.below_floor(points, None) == []
    assert objective.below_floor(points, {"a": 50.0, "b": 21.5}) == ["b"]
    assert objective.below_floor(points, {"a": 99.0, "b": 20.9}) == []
    with pytest.raises(TokenCreditError, match="must be a number or control-NUMBER"):
        Objective.read({"tasks": {"a": {"floor": "best"}}})
    with pytest.raises(EvaluationFailed, match="lack task 'b'"):
        objective.points(Metrics(tasks={"a": TaskScore(score=1.0)}))


def test_the_finalist_is_above_the_floor(tmp_path: Path) -> None:
    search = search_of(tmp_path, budget=6)
    search.run()
    best = search.finalists(1)[0]
    search.history[best.slot - 1] = replace(best, below_floor=["t"])
    assert search.finalists(1)[0].slot != best.slot


def test_finalists_differ(tmp_path: Path) -> None:
    search = search_of(tmp_path, policy="random", budget=6)
    search.run()
    best = search.finalists(1)[0]
    positions = search.chooser.seen[best.subset_hash]
    # almost the best subset again, with almost its score: it may not be the second finalist
    search.history.append(replace(best, slot=7, subset_hash="twin", score=best.score - 1e-9))
    search.chooser.seen["twin"] = positions[: -len(positions) // 20]
    first, second = search.finalists(2)
    assert first.slot == best.slot and second.slot != 7


def test_candidates_are_rejected_with_a_reason(tmp_path: Path) -> None:
    search = search_of(tmp_path, min_samples=100, min_token_ratio=0.3)

    def why(*steps: dict) -> str:
        return search.chooser.materialise(_recipe(*steps)).why

    draw = {"op": "random_k", "k": 400, "seed": 1}
    subset = search.chooser.materialise(_recipe(draw)).subset
    assert why(draw) == ""
    search.chooser.seen[subset.hash] = subset.positions
    assert why(draw) == "already evaluated"
    assert why({**draw, "k": 396}) == "Jaccard above 0.98 with an evaluated subset"
    assert why({**draw, "k": 380}) == ""
    assert why({**draw, "k": 99}) == "99 samples, floor 100"
    assert why({**draw, "k": 120}).startswith("token ratio 0.")
    assert "leaves no sample" in why({"op": "threshold", "signal": "ifd", "value": 99})


def test_replay_gives_the_same_history_and_refuses_a_miss(tmp_path: Path) -> None:
    original = comparable(search_of(tmp_path / "a").run())
    replayed = search_of(tmp_path / "b", evaluator=replay_of([tmp_path / "a"])).run()
    assert comparable(replayed) == original
    with pytest.raises(TokenCreditError, match="no logged run of subset"):
        search_of(tmp_path / "c", evaluator=ReplayEvaluator(results={}), seed=2).run()


def test_surfaces_have_the_declared_values() -> None:
    pool = synthetic_pool(9000)
    everything = np.arange(9000, dtype=np.int32)
    # 30.6 + 8.6 − 10 · .12 = 38.0, and half of the tokens 30.6 + 8.6 (1 − e^{−.5/.12}) − 10 · .06 = 38.5
    assert SURFACES["mono"](pool, everything) == pytest.approx(38.0, abs=0.15)
    half = np.arange(0, 9000, 2, dtype=np.int32)
    assert SURFACES["mono"](pool, half) == pytest.approx(38.5, abs=0.25)
    assert SURFACES["flat"](pool, half) == 40.0


def test_surrogate_recovers_a_linear_trend_and_ignores_an_outlier() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((15, 6))
    truth = 40 + x @ np.array([1.0, 0.5, 0, 0, 0, 0])
    known, points = standardise(x, rng.standard_normal((20, 6)))
    groups = ["scale"] * 2 + ["signal"] * 4
    model = fit(known, groups, truth + 0.3 * rng.standard_normal(15), noise_sd=0.3)
    mean, sd = model.predict(known)
    assert np.corrcoef(mean, truth)[0, 1] > 0.95
    far = model.predict(points * 6)[1]
    assert (far > sd.max()).all()
    assert 0.1 < model.noise_sd < 0.9


def test_surrogate_knows_that_a_moderate_amount_can_be_best() -> None:
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    model = fit(x, ["signal"], 40 - x[:, 0] ** 2, noise_sd=0.1)
    centre, edge, beyond = model.predict(np.array([[0.0], [2.0], [4.0]]))[0]
    assert centre == pytest.approx(40.0, abs=0.3) and edge == pytest.approx(36.0, abs=0.3)
    assert beyond < 32.0  # goes on falling, where "near what was good" would come back to the level


def test_the_variance_of_a_point_is_the_kernels() -> None:
    # Far from all data only the prior is left: a² [½ + ¼ u + ¼ u²] + 4 less what the polynomial half explains.
    x = np.array([[0.0], [1e-9]])
    model = fit(x, ["signal"], np.array([40.0, 40.0]), noise_sd=1e-3)
    sd = model.predict(np.array([[3.0]]))[1][0]  # u = 9; u = 0 at the data, so of the kernel only the 4 is shared
    amplitude, length = np.exp(2 * model.hyper[0]), np.exp(model.hyper[2])
    radius = np.sqrt(5.0) * 3.0 / length
    shared = amplitude * 0.5 * (1 + radius + radius**2 / 3) * np.exp(-radius) + 4.0
    at_data = amplitude * 0.5 + 4.0
    expected = amplitude * (0.5 + 0.25 * 9 + 0.25 * 81) + 4.0 - shared**2 / at_data
    assert sd == pytest.approx(np.sqrt(expected), rel=1e-3)


def test_log_expected_improvement_is_finite_far_below() -> None:
    # at z = 0 the improvement is sd φ(0) = .3989 sd
    values = log_expected_improvement(np.array([1.0, -30.0, -1e5]), np.array([2.0, 1.0, 1.0]), 1.0)
    assert values[0] == pytest.approx(np.log(2 / np.sqrt(2 * np.pi)))
    assert np.isfinite(values).all() and values[1] > values[2]


def test_expected_maximum_and_power() -> None:
    assert expected_maximum(15) == pytest.approx(1.736, abs=1e-3)
    assert expected_maximum(12) == pytest.approx(1.629, abs=1e-3)
    assert [seeds_needed(gap, 0.5) for gap in (0.5, 1.0, 1.5, 2.0)] == [17, 6, 4, 3]
    assert half_width(3, 0.5) == pytest.approx(1.13, abs=0.005)
    assert half_width(5, 0.5) == pytest.approx(0.73, abs=0.005)


def test_shrinkage() -> None:
    # scores 39, 40, 41: s² = 1, σ² = .25, σᵤ² = .75, factor .75, estimate 40 + .75 · 1
    found = shrunken([_evaluation(i, s) for i, s in enumerate((39.0, 41.0, 40.0))], 0.5)
    assert (found.estimate, found.gain, found.best) == pytest.approx((40.75, 0.75, 41.0))
    assert shrunken([_evaluation(1, 40.0), _evaluation(2, 40.3)], 0.5).gain == 0.0


def test_confirmation_resumes_and_finds_a_planted_gap(tmp_path: Path) -> None:
    search = search_of(tmp_path, budget=6)
    search.run()
    arms = [*standard_arms(search), Arm(name="tiny", recipe=_recipe({"op": "random_k", "k": 60, "seed": 1}))]
    first = confirm_arms(search, arms[:2], 2)
    assert len((tmp_path / "confirm.jsonl").read_text().splitlines()) == 4
    result = confirm_arms(search, arms, 4)
    assert len((tmp_path / "confirm.jsonl").read_text().splitlines()) == 4 * len(arms)
    assert first.scores()["finalist"] == result.scores()["finalist"][:2]
    controls = {run["subset_hash"] for run in result.runs["random, equal tokens"]}
    assert len(controls) == 4  # drawn anew for every seed
    assert len({run["subset_hash"] for run in result.runs["finalist"]}) == 1
    gap = {d.control: d for d in differences(result)}["tiny"]
    assert gap.confirmed and gap.low < gap.mean < gap.high
    content = save_summary(search, result)
    page = (tmp_path / "report.html") if build_report(search) else None
    assert page is not None and "Confirmation" in page.read_text()
    assert content["finalist"]["seeds"] == 4


def _recipe(*steps: dict):
    from tokencredit.recipes.program.recipe import make_recipe

    return make_recipe(steps)


def test_bootstrap_widens_what_few_items_cannot_tell(tmp_path: Path) -> None:
    class Items:
        key = "items"

        def __call__(self, request: Request) -> Metrics:
            rng = np.random.default_rng(5)
            scores = (rng.random(40) < (0.6 if len(request.positions) > 500 else 0.5)).astype(float)
            items = {("t", str(i)): float(s) for i, s in enumerate(scores)}
            return Metrics(tasks={"t": TaskScore(score=scores.mean())}, items=items)

    search = search_of(tmp_path, evaluator=Items(), budget=4)
    search.run()
    arms = [
        Arm(name="finalist", recipe=_recipe({"op": "random_k", "k": 550, "seed": 1})),
        Arm(name="small", recipe=_recipe({"op": "random_k", "k": 100, "seed": 1})),
    ]
    found = differences(confirm_arms(search, arms, 3))[0]
    # all seeds agree, so the t interval has width 0; forty items leave several points
    assert found.method == "bootstrap over seeds and items"
    assert found.high - found.low > 0.05


def test_report_escapes_what_it_shows(tmp_path: Path) -> None:
    class Nasty:
        key = "nasty"

        def __call__(self, request: Request) -> Metrics:
            if len(request.positions) % 2:
                raise EvaluationFailed("<script>alert(1)</script>")
            return Metrics(tasks={"t": TaskScore(score=1.0)})

    search = search_of(tmp_path, evaluator=Nasty(), budget=7)
    history = search.run()
    assert any(not evaluation.ok for evaluation in history)
    build_report(search)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"budget": 15}}, "a search needs a seed"),
        ({"search": {"seed": 1, "polcy": "paper"}}, "unknown key of `search` 'polcy', did you mean 'policy'"),
        ({"search": {"seed": 1, "policy": "papr"}}, "unknown `search.policy` 'papr', did you mean 'paper'"),
        ({"search": {"seed": 1, "budget": 3}}, "must exceed `search.warmup`"),
        ({"search": {"seed": 1, "budget": "15"}}, "`search.budget` must be a whole number of at least 1, got '15'"),
        ({"search": {"seed": 1, "operators": ["topp"]}}, "unknown operator 'topp'"),
        ({"objectives": {}}, "unknown key of a search file 'objectives', did you mean 'objective'"),
        ({"objective": {"noise": 1}}, "unknown key of `objective` 'noise'"),
        ({"pool": ""}, "`pool` must be the path of a pool folder"),
    ],
)
def test_a_wrong_search_file_is_refused(change: dict, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        make_config({"pool": "p", "evaluator": {"kind": "replay"}, "search": {"seed": 1}} | change)


def test_history_survives_the_disk(tmp_path: Path) -> None:
    history = search_of(tmp_path, budget=5).run()
    assert load_history(tmp_path) == history
    (tmp_path / HISTORY).write_text('{"slot": 1}\n')
    with pytest.raises(TokenCreditError, match="written by another version"):
        load_history(tmp_path)
    (tmp_path / HISTORY).write_text("nonsense\n")
    with pytest.raises(TokenCreditError, match=r"history\.jsonl:1: not a JSON line"):
        load_history(tmp_path)


def test_the_control_of_one_operator_is_never_left_out(tmp_path: Path) -> None:
    search = search_of(tmp_path, budget=6)
    search.run()
    assert not [e for e in search.history if len(e.steps) == 1 and e.kind != "control"]
    arms = {arm.name: arm for arm in standard_arms(search)}
    single = arms["best single operator, by forecast"].recipe
    assert single is not None and len(single.steps) == 1
    assert single.steps[0] in search.finalists(1)[0].recipe.steps
    tried = replace(search.history[0], steps=[{"op": "random_k", "k": 77, "seed": 1}], slot=9)
    search.history.append(tried)
    assert {arm.name: arm for arm in standard_arms(search)}["best single operator"].recipe.steps == tried.recipe.steps
