"""Run folders: whole, unfinished, torn, of a comparison, or none at all."""

import json
from pathlib import Path

import pytest
from support import sample_runs

from tokencredit.errors import TokenCreditError
from tokencredit.report.run_page.folders import NOT_STARTED, by_label, load_runs


def write(folder: Path, lines: list[dict] | bytes = b"", **content: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(content))
    raw = lines if isinstance(lines, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(raw)
    return folder


def test_one_run(tmp_path: Path) -> None:
    folder = sample_runs.write_run(tmp_path / "run", "hapo", 3, steps=20)
    (run,) = load_runs([folder])
    assert (run.label, run.seed, run.task, run.status, run.last_step) == ("hapo", 3, "countdown", "finished", 20)
    assert run.settings["trainer"]["loss_type"] == "dapo"
    assert len(run.records) == 1
    assert list(run.evaluations) == [0, 20] and len(run.evaluations[0]) == 64
    assert set(run.series("train", "nothing", "reward")) == set(range(21))
    assert run.series("train", "nothing") == {}


def test_a_comparison_in_its_own_order_with_runs_that_have_not_started(tmp_path: Path) -> None:
    names = ["hapo/seed-0", "grpo/seed-0", "grpo/seed-1"]
    (tmp_path / "compare.json").write_text(json.dumps({"runs": names}))
    write(tmp_path / "grpo/seed-0", label="grpo", seed=0)
    write(tmp_path / "hapo/seed-0", label="hapo", seed=0)
    runs = load_runs([tmp_path])
    assert [run.label for run in runs] == ["hapo", "grpo", "grpo"]
    assert runs[2].status == NOT_STARTED and runs[2].lines == ()
    assert [len(group) for group in by_label(runs).values()] == [1, 2]


def test_minimal_run(tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (run,) = load_runs([folder])
    assert (run.name, run.label, run.seed, run.status) == ("alone", "alone", None, "unknown")
    assert run.lines == [] and len(run.records) == 0 and run.last_step == 0


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "kind": "train", "metrics": {"reward": 0.5}}).encode() + b"\n"
    (run,) = load_runs([write(tmp_path / "run", whole + whole[: len(whole) // 2])])
    assert [line.step for line in run.lines] == [1]


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "kind": "train", "metrics": {}}).encode() + b"\n"
    with pytest.raises(TokenCreditError, match=r"metrics\.jsonl, line 1: "):
        load_runs([write(tmp_path / "run", b'{"step": 1}\n' + whole)])


def test_lines_of_one_step_add_up_and_the_later_wins(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "kind": "train", "metrics": {"reward": 0.1, "loss": 1.0}},
        {"step": 2, "kind": "train", "metrics": {"reward": 0.2, "note": "text", "bad": None}},
        {"step": 1, "kind": "eval", "metrics": {"success": 0.5, "per_problem": [0.0, 1.0]}},
    ]
    (run,) = load_runs([write(tmp_path / "run", lines)])
    assert [line.step for line in run.lines] == [1, 2]
    assert dict(run.lines[1].metrics) == {"reward": 0.2, "loss": 1.0}
    assert run.evaluations == {1: [0.0, 1.0]}


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    raw = b'{"step": 1, "kind": "train", "metrics": {"loss": NaN, "grad": Infinity, "reward": 1}}\n'
    (run,) = load_runs([write(tmp_path / "run", raw)])
    assert dict(run.lines[0].metrics) == {"reward": 1.0}


def test_same_label_and_seed_from_two_folders_are_told_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "a", label="hapo", seed=0, name="a")
    second = write(tmp_path / "b", label="hapo", seed=0, name="b")
    assert [run.label for run in load_runs([first, second])] == ["hapo", "hapo (b)"]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match=r"holds none of run\.json, compare\.json") as caught:
        load_runs([tmp_path])
    assert str(tmp_path) in str(caught.value) and caught.value.hint is not None
    with pytest.raises(TokenCreditError, match="is not a folder"):
        load_runs([tmp_path / "none"])
    with pytest.raises(TokenCreditError, match="no run to report"):
        load_runs([])


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "must hold a JSON object, got list"), ("{", r"run\.json is not valid JSON: ")]
)
def test_a_broken_run_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TokenCreditError, match=message):
        load_runs([tmp_path])
