"""The table and the curves, on runs typed by hand."""

import math
from pathlib import Path

from tokencredit.report.run_page.folders import Line, Run
from tokencredit.report.run_page.results import as_json, metric_curves, results, success_curves


def make(label: str, seed: int, evaluations: dict[int, list[float]], train: dict[int, float] | None = None) -> Run:
    lines = [Line(step, "eval", {"success": sum(v) / len(v)}, v) for step, v in evaluations.items()]
    lines += [Line(step, "train", {"reward": value}, None) for step, value in (train or {}).items()]
    return Run(folder=Path("none"), name=f"{label}-{seed}", label=label, seed=seed, lines=lines)


def test_start_end_and_paired_difference() -> None:
    runs = [
        make("grpo", 0, {0: [0.0, 0.0, 1.0, 0.0], 10: [1.0, 0.0, 1.0, 0.0]}),
        make("grpo", 1, {0: [0.0, 0.0, 1.0, 0.0], 10: [1.0, 0.0, 1.0, 0.0]}),
        make("hapo", 1, {0: [0.0, 0.0, 1.0, 0.0], 10: [1.0, 1.0, 1.0, 0.0]}),
        make("hapo", 0, {0: [0.0, 0.0, 1.0, 0.0], 10: [1.0, 1.0, 1.0, 0.0]}),
    ]
    grpo, hapo = results(runs)
    assert (grpo.label, grpo.seeds, grpo.first_step, grpo.last_step, grpo.difference) == ("grpo", 2, 0, 10, None)
    assert grpo.start is not None and grpo.end is not None and hapo.difference is not None
    assert grpo.start.mean == 0.25 and grpo.end.mean == 0.5
    assert hapo.difference.mean == 0.25 and hapo.paired_seeds == 2
    # The seeds agree, so only the four problems count: one of four gains 1, and all of a resample is 0 or more.
    assert hapo.difference.low == 0.0 and hapo.difference.high <= 0.75


def test_an_unfinished_seed_sets_the_last_common_step() -> None:
    runs = [
        make("grpo", 0, {0: [0.0], 10: [1.0], 20: [1.0]}),
        make("grpo", 1, {0: [0.0], 10: [0.0]}),
        make("hapo", 1, {0: [0.0], 20: [1.0]}),
        make("rloo", 5, {0: [0.0], 20: [1.0]}),
        make("none", 0, {}),
    ]
    grpo, hapo, rloo, none = results(runs)
    assert grpo.last_step == 10 and grpo.end is not None and grpo.end.mean == 0.5
    assert hapo.difference is not None and hapo.difference.mean == 0.0 and hapo.paired_seeds == 1  # at step 0
    assert rloo.difference is None  # no seed in common
    assert none.seeds == 0 and none.end is None and none.difference is None


def test_seeds_with_different_numbers_of_problems_count_as_seeds() -> None:
    runs = [make("grpo", 0, {0: [0.0, 1.0]}), make("grpo", 1, {0: [1.0, 1.0, 1.0]}), make("hapo", 0, {0: [1.0]})]
    grpo, hapo = results(runs)
    assert grpo.end is not None and grpo.end.mean == 0.75  # (.5 + 1)/2
    assert hapo.difference is not None and hapo.difference.mean == 0.5


def test_json_has_no_nan() -> None:
    rows = as_json(results([make("grpo", 0, {0: [0.5]})]))
    assert rows[0]["end"] == {"mean": 0.5, "low": None, "high": None}
    assert rows[0]["difference"] is None


def test_success_curves() -> None:
    (curve,) = success_curves(
        [make("grpo", 0, {0: [0.0, 1.0], 10: [1.0, 1.0]}), make("grpo", 1, {0: [0.0, 0.0]}), make("none", 0, {})]
    )
    assert curve.steps == [0.0, 10.0] and curve.mean == [0.25, 1.0]  # at step 10 one seed is left
    assert curve.low[0] <= 0.25 <= curve.high[0]
    assert math.isnan(curve.low[1])  # another seed might differ by anything


def test_training_curves_average_stretches_of_steps() -> None:
    run = make("grpo", 0, {}, {step: float(step) for step in range(1, 181)})
    (curve,) = metric_curves([run], lambda run: run.series("train", "reward"))
    # 180 steps, 60 points: stretches of three; the first holds steps 1 and 2, then 3, 4, 5 …
    assert curve.steps[:2] == [1.0, 4.0] and curve.mean[:2] == [1.5, 4.0]
    assert all(map(math.isnan, curve.low))  # one seed has no band
    short = make("grpo", 0, {}, {0: 1.0, 1: 3.0})
    other = make("grpo", 1, {}, {0: 2.0})
    (curve,) = metric_curves([short, other], lambda run: run.series("train", "reward"))
    assert curve.steps == [0.0, 1.0] and curve.mean == [1.5, 3.0]
    assert (curve.low[0], curve.high[0]) == (1.0, 2.0)  # the band is what the two seeds did
    assert math.isnan(curve.low[1])
