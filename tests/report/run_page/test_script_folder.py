"""The report of a training script of one's own: a trainer's folder, credit records, or both."""

import json
import re
from pathlib import Path

import pytest
from support import sample_runs

from tokencredit.batch.store import RecordStore
from tokencredit.cli.main import main
from tokencredit.errors import TokenCreditError
from tokencredit.report import write_report
from tokencredit.report.run_page.folders import load_runs
from tokencredit.report.run_page.results import measure_of, summary

HISTORY = [
    {"step": step, "loss": 0.1, "reward": step / 100, "entropy": 1.0, "credit/gini": 0.3, "epoch": 0.1}
    for step in range(5, 25, 5)
]


def records_of(folder: Path, label: str = "hapo") -> Path:
    """Records in `folder`, as `CreditGRPOTrainer(records=folder)` writes them."""
    run = sample_runs.write_run(folder.parent / "source", label, 0, steps=0, every=25)
    (run / "records").rename(folder)
    return folder


def write_state(folder: Path, history: list[dict] = HISTORY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": history}))
    return folder


def test_history_of_the_last_checkpoint_and_records(tmp_path: Path) -> None:
    write_state(tmp_path / "out/checkpoint-9", HISTORY[:1])
    write_state(tmp_path / "out/checkpoint-20")
    records_of(tmp_path / "out/credit_records")
    (run,) = load_runs([tmp_path / "out"])
    assert run.label == "hapo" and run.last_step == 20 and len(run.records) == 1
    assert run.series("train", "reward") == {5: 0.05, 10: 0.1, 15: 0.15, 20: 0.2}
    text = write_report([tmp_path / "out"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Nothing was evaluated on held-out problems" in text and "eval_dataset" in text
    assert "Responses, token by token" in text


@pytest.mark.parametrize("inside", ["", "records", "kept"])
def test_records_alone_are_enough(tmp_path: Path, inside: str) -> None:
    kept = records_of(tmp_path / "kept")
    (tmp_path / "out" / inside).parent.mkdir(exist_ok=True)
    kept.rename(tmp_path / "out" / inside)
    (run,) = load_runs([tmp_path / "out"])
    assert run.label == "hapo" and len(run.records) == 1


def test_rewards_stand_in_where_nothing_was_evaluated(tmp_path: Path) -> None:
    runs = load_runs([write_state(tmp_path / "a"), write_state(tmp_path / "b", [{"step": 1, "reward": 0.9}])])
    assert measure_of(runs).name == "training reward"
    rows = summary(runs)
    assert rows[0].start.mean == pytest.approx(0.125) and rows[0].last_step == 20
    assert rows[1].difference.mean == pytest.approx(0.775)


def test_evaluations_of_a_trainer_are_mean_rewards(tmp_path: Path) -> None:
    history = [*HISTORY, {"step": 20, "eval_reward": 0.5, "eval_loss": 0.0}]
    runs = load_runs([write_state(tmp_path / "a", history)])
    assert measure_of(runs).name == "mean reward" and not measure_of(runs).percent
    assert runs[0].evaluations == {20: [0.5]}


def test_the_command_takes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_state(tmp_path / "a")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measure"] == "training reward" and found["results"][0]["end"]["mean"] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold a JSON object, got list"),
        ({"log_history": 3}, "`log_history` must be a list, got 3"),
        ({"log_history": [{"loss": 1.0}]}, "entry 0 of `log_history` has no step"),
    ],
)
def test_a_broken_state_is_named(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(TokenCreditError, match=re.escape(message)):
        load_runs([tmp_path])


@pytest.mark.parametrize("name", ["../grpo", "/abs", "a/../../b", "a\0", "\ud800", "", 3, "."])
def test_a_comparison_never_points_outside_its_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"runs": [name]}))
    with pytest.raises(TokenCreditError, match="`runs` must"):
        load_runs([tmp_path])


def test_records_of_another_folder_are_not_guessed(tmp_path: Path) -> None:
    folder = write_state(tmp_path / "out")
    for name in ("one", "two"):
        source = records_of(tmp_path / name)
        source.rename(folder / name)
        (tmp_path / "source").rename(tmp_path / f"source-{name}")
    (run,) = load_runs([folder])
    assert len(run.records) == 0
    assert len(RecordStore(folder / "one")) == 1
