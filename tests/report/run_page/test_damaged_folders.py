"""Whatever is broken in a run folder, the report is written or one line says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from markupsafe import Markup
from matplotlib.figure import Figure
from support import damage, sample_runs

from tokencredit.errors import TokenCreditError
from tokencredit.report import plots, write_report


def plan_only(name: str, draw: Callable[[Any], None], *, bottom: float = 0.18) -> Markup:
    """Stands in for the drawing of a picture, which takes most of the time of a report."""
    axes = Figure().add_axes((0.1, bottom, 0.8, 0.7))
    draw(axes)
    plots._write_whole_labels(axes)
    return Markup("<svg></svg>")


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "svg", plan_only)


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two small runs, one that says all that an evaluation can, and a script's folder."""
    folder = tmp_path_factory.mktemp("whole")
    for label in ("grpo", "hapo"):
        sample_runs.write_run(folder / label / "seed-0", label, 0, steps=20, every=10)
    line = {
        "step": 20,
        "kind": "eval",
        "metrics": {"reward": 1.5, "success": 0.5, "per_problem": [1.0, 2.0], "binary": False, "threshold": 0.0},
    }
    with (folder / "hapo/seed-0/metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (folder / "compare.json").write_text(json.dumps({"runs": ["grpo/seed-0", "hapo/seed-0"], "seeds": [0]}))
    return folder


@pytest.fixture(scope="module")
def script(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    shutil.copytree(whole / "hapo/seed-0/records", folder / "credit")
    index = folder / "credit/records.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    without_hash = [{key: value for key, value in line.items() if key != "digest"} for line in lines]  # as it was once
    index.write_text("".join(json.dumps(line) + "\n" for line in without_hash))
    (folder / "checkpoint-20").mkdir()
    history = [
        {"step": 10, "loss": 0.1, "reward": 0.2, "credit/gini": 0.3, "epoch": 0.5},
        {"step": 20, "loss": 0.1, "reward": 0.4, "credit/gini": 0.3},
        {"step": 20, "eval_reward": 0.5, "eval_loss": 0.0},
    ]
    (folder / "checkpoint-20/trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": history}))
    return folder


def reported(source: Path, here: Path, damages: list[tuple[str, float, float, Any]]) -> None:
    folder = damage.fresh_copy(source, here / "folder")
    for item in damages:
        damage.apply(folder, *item)
    try:
        path = write_report([folder], here / "report.html")
    except TokenCreditError as error:
        assert "\n" not in error.message
        return
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.usefixtures("without_pictures")
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(damages=damage.damages())
def test_a_damaged_comparison(whole: Path, tmp_path: Path, damages: list) -> None:
    reported(whole, tmp_path, damages)


@pytest.mark.usefixtures("without_pictures")
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(damages=damage.damages())
def test_a_damaged_folder_of_a_script(script: Path, tmp_path: Path, damages: list) -> None:
    reported(script, tmp_path, damages)


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
@settings(max_examples=20_000, deadline=None, suppress_health_check=QUIET)
@given(damages=damage.damages())
def test_many_damaged_folders(whole: Path, tmp_path: Path, damages: list) -> None:
    reported(whole, tmp_path, damages)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(damages=damage.damages())
def test_damaged_folders_with_their_pictures(whole: Path, tmp_path: Path, damages: list) -> None:
    reported(whole, tmp_path, damages)
