"""Methods side by side: paired seeds, results, resume, refusals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_setup import model_folder, small_config, write_yaml  # noqa: F401

from tokencredit.errors import TokenCreditError
from tokencredit.runs import folders
from tokencredit.runs.compare import plan_runs, results
from tokencredit.runs.config import load_config
from tokencredit.runs.folders import label_of


def test_plans_pair_methods_within_a_seed() -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", {"hapo": {"alpha": 1.0}}], range(2))
    assert [plan.path for plan in plans] == [
        "grpo/seed-0",
        "hapo_alpha_1.0_/seed-0",
        "grpo/seed-1",
        "hapo_alpha_1.0_/seed-1",
    ]
    assert all(plan.config["steps"] == plans[0].config["steps"] for plan in plans)
    with pytest.raises(TokenCreditError, match="'grpo' is named twice"):
        plan_runs(load_config({"task": "countdown"}), ["grpo", "grpo"], range(1))
    with pytest.raises(TokenCreditError, match="did you mean 'grpo'"):
        plan_runs(load_config({"task": "countdown"}), ["grpoo"], range(1))


SUM = {"weighted_sum": [{"weight": 0.5, "credit": "grpo"}, {"weight": 1.0, "credit": ["signed_outcome"]}]}


@pytest.mark.parametrize(
    ("credit", "label"),
    [
        ("hapo", "hapo"),
        ({"hapo": {"alpha": 0.3}}, "hapo(alpha=0.3)"),
        (["group_normalized", "entropy_bonus"], "group_normalized → entropy_bonus"),
        (
            ["group_normalized", {"attention_schedule": {"direction": "high_to_low", "beta": 0.5}}],
            "group_normalized → attention_schedule(direction=high_to_low)",
        ),
        (SUM, "0.5 (group_normalized) + signed_outcome"),
    ],
)
def test_labels_tell_pipelines_apart(credit: object, label: str) -> None:
    assert label_of(credit) == label


def test_pipelines_of_the_same_steps_are_compared() -> None:
    credits = [["group_normalized", {"attention_schedule": {"direction": d}}] for d in ("high_to_low", "anchors")]
    plans = plan_runs(load_config({"task": "countdown"}), credits, range(1))
    assert len({plan.path for plan in plans}) == 2
    shifted = [["group_normalized", {"constant_scale": {"scale": scale}}] for scale in (-2.0, 2.0)]
    assert len({plan.path for plan in plan_runs(load_config({"task": "countdown"}), shifted, range(1))}) == 2
    with pytest.raises(TokenCreditError, match="'grpo \\+hapo' and 'grpo\\+ hapo' would share"):
        plan_runs(load_config({"task": "countdown"}), ["hapo", "grpo +hapo", "grpo+ hapo"], range(1))


def test_results_by_hand(tmp_path: Path) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(2))
    # end success: grpo .2 .4 | .4 .6 -> mean .4; hapo .1 higher everywhere -> difference exactly .1, no spread
    ends = {("grpo", 0): [0.2, 0.4], ("grpo", 1): [0.4, 0.6], ("hapo", 0): [0.3, 0.5], ("hapo", 1): [0.5, 0.7]}
    for plan in plans:
        folder = tmp_path / plan.path
        folder.mkdir(parents=True)
        folders.append_metrics(folder, 0, "eval", {"success": 0.1, "per_problem": [0.1, 0.1]})
        folders.append_metrics(folder, 1, "train", {"reward": 0.25})
        end = ends[plan.label, plan.seed]
        folders.append_metrics(folder, 1, "eval", {"success": sum(end) / 2, "per_problem": end})
    grpo, hapo = results(plans, tmp_path)
    assert grpo["start"]["mean"] == pytest.approx(0.1)
    assert grpo["end"]["mean"] == pytest.approx(0.4)
    assert grpo["difference"] is None
    assert grpo["reward"] == 0.25
    assert hapo["difference"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert grpo["end"]["low"] < 0.4 < grpo["end"]["high"]


def command(config: Path, out: Path) -> list[str]:
    credit = ["--credit", "grpo", "hapo", "--seeds", "1", "--jobs", "1", "--json"]
    return [sys.executable, "-m", "tokencredit.cli.main", "compare", str(config), *credit, "--out", str(out)]


def values(folder: Path) -> list[dict]:
    return [line["metrics"] for line in folders.read_metrics(folder) if line["kind"] == "eval"]


def workers(session: int) -> list[int]:
    """Living processes of a session; a zombie has nothing left to run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if state != "Z" and int(owner) == session else []
    return found


def test_a_killed_comparison_resumes_to_the_same_numbers(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write_yaml(tmp_path / "small.yaml", small_config(model_folder, steps=6))
    whole = subprocess.run(command(config, tmp_path / "whole"), capture_output=True, text=True, check=True)
    assert '"label": "hapo"' in whole.stdout
    cut = subprocess.Popen(command(config, tmp_path / "cut"), stdout=subprocess.DEVNULL, start_new_session=True)
    first = tmp_path / "cut" / "grpo" / "seed-0"
    deadline = time.monotonic() + 120
    while len(values(first)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(cut.pid, signal.SIGKILL)  # the command alone: its workers must end by themselves
    cut.wait()
    deadline = time.monotonic() + 30
    while workers(cut.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(cut.pid)
    subprocess.run(command(config, tmp_path / "cut"), capture_output=True, check=True)
    for path in ("grpo/seed-0", "hapo/seed-0"):
        assert values(tmp_path / "cut" / path) == values(tmp_path / "whole" / path)
    assert (tmp_path / "cut" / "report.html").stat().st_size > 10_000
