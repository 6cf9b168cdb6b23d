"""Several ranks through the command line: the numbers of one process, and what happens when one of them breaks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import printed, run_ranks
from rank_faults import command, train_without_tokens, write_config
from safetensors.torch import load_file
from test_trl_ranks import differences

from tokencredit.batch.store import RecordStore
from tokencredit.cli.main import main
from tokencredit.runs import folders
from tokencredit.runs.config.load import load_config
from tokencredit.runs.train import train_run

SUPPORT = str(Path(__file__).parents[1] / "support")
NUMBERS = ("loss", "grad_norm", "reward", "credit/abs_mean", "credit/gini", "entropy")


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SUPPORT)
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "killed"))


def launch(config: Path, out: Path, ranks: int) -> subprocess.CompletedProcess:
    arguments = ["train", str(config), "--out", str(out), "--launch", "torchrun", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, "-m", "tokencredit.cli.main", *arguments], capture_output=True, text=True, timeout=300
    )


def assert_same_runs(one: Path, other: Path) -> None:
    """Everything that two runs leave behind, but for times and the number of ranks."""
    lines = [[line for line in folders.read_metrics(folder) if line["kind"] == "train"] for folder in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(*lines, strict=True):
        for name in NUMBERS:
            assert ours["metrics"][name] == pytest.approx(theirs["metrics"][name], rel=1e-3, abs=1e-5), name
    stores = [RecordStore(folder / "records") for folder in (one, other)]
    assert stores[0].steps == stores[1].steps == [0, 1, 2, 3, 4]
    for record, same in zip(*stores, strict=True):
        assert torch.equal(record.batch.response_ids, same.batch.response_ids)
        torch.testing.assert_close(record.advantages, same.advantages, rtol=1e-2, atol=1e-3)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


def test_a_killed_rank_stops_the_launcher_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, "killed_once")
    train_run(load_config(config), tmp_path / "alone")
    killed = launch(config, tmp_path / "two", 2)
    assert killed.returncode == 128 + signal.SIGKILL, killed.stderr
    assert killed.stderr.strip().splitlines()[-2:] == [
        "error: rank 1 was ended by SIGKILL",
        "hint: the same command goes on from the last checkpoint",
    ]
    assert "Traceback" not in killed.stderr
    # What is left is whole: three steps of records, a checkpoint of step 2, a run that says it is not finished.
    assert RecordStore(tmp_path / "two" / "records").steps == [0, 1, 2]
    assert folders.last_checkpoint(tmp_path / "two") == tmp_path / "two" / "checkpoint-2"
    assert folders.read_json(tmp_path / "two" / "run.json")["status"] == "running"
    resumed = launch(config, tmp_path / "two", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("report: ") == 1, "only one rank prints"
    assert_same_runs(tmp_path / "alone", tmp_path / "two")


def test_nan_on_one_rank_stops_all_of_them(tmp_path: Path) -> None:
    config = write_config(tmp_path, "nan_on_rank_one")
    codes = run_ranks(2, tmp_path / "ranks", command, "train", str(config), "--out", str(tmp_path / "run"), timeout=60)
    told = printed(tmp_path / "ranks")
    assert codes == [1, 2], told
    assert told.count("error: rank 1: reward function 'nan_on_rank_one' gave nan for row 7 of its batch") == 1
    assert told.count("error: rank 0: another process of the run has gone") == 1
    assert "Traceback" not in told
    assert RecordStore(tmp_path / "run" / "records").steps == [0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stepz": 3}, "error: unknown config key 'stepz', did you mean 'steps'?"),
        ({"prompts_per_step": 1, "trainer": {"num_generations": 2}}, "error: 3 processes for 2 rows"),
        (
            {"prompts_per_step": 5, "trainer": {"num_generations": 4}},
            "20 rows of a step (5 prompts × 4 generations) cannot be split over 3 processes",
        ),
        (
            {
                "prompts_per_step": 1,
                "trainer": {"num_generations": 6, "max_completion_length": 6},
                "credit": "opd",
                "teacher": {"kind": "self", "template": "{attempt}={prompt}"},
            },
            "2 rows a process cut groups of 6 apart",
        ),
    ],
)
def test_bad_input_is_told_once(tmp_path: Path, changes: dict, expected: str) -> None:
    config = write_config(tmp_path, **changes)
    codes = run_ranks(3, tmp_path / "ranks", command, "train", str(config), "--out", str(tmp_path / "run"))
    told = printed(tmp_path / "ranks")
    assert codes == [2, 2, 2], told
    assert told.count("error: ") == 1 and expected in told
    assert not (tmp_path / "run").exists()


def test_ranks_without_a_token_neither_hang_nor_bias(tmp_path: Path) -> None:
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        assert run_ranks(ranks, folder, train_without_tokens, folder, ranks) == [0] * ranks, printed(folder)[-3000:]
    one, two = (json.loads((tmp_path / str(ranks) / "found.json").read_text()) for ranks in (1, 2))
    for credit in one:
        records = [list(RecordStore(tmp_path / str(ranks) / credit)) for ranks in (1, 2)]
        assert [differences(*pair) for pair in zip(*records, strict=True)] == [[], []]
        mask = records[1][0].batch.response_mask
        assert mask[:12].any() and not mask[12:].any()
        assert records[1][0].advantages[:12].abs().max() > 0
        assert two[credit]["norm"] == pytest.approx(one[credit]["norm"], rel=1e-5, abs=1e-6)
        assert two[credit]["loss"] == pytest.approx(one[credit]["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--launch", "torchrun", "--nproc-per-node", "0"], "must be at least 1, got 0"),
        (["--nproc-per-node", "2"], "needs `--launch`"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture, arguments: list[str], expected: str
) -> None:
    assert main(["train", "missing.yaml", *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "verb", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "train", "RANK is not set: one process would wait for the others forever"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "train", "RANK must be below WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "train", "WORLD_SIZE must be a whole number, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "compare", "`tokencredit compare` runs in one process"),
    ],
)
def test_a_broken_environment_is_refused(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, names: dict[str, str], verb: str, expected: str
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    more = ["--credit", "grpo"] if verb == "compare" else []
    assert main([verb, "missing.yaml", *more]) == 2
    assert expected in capsys.readouterr().err
    assert os.environ.get("WORLD_SIZE") == names.get("WORLD_SIZE")


def test_a_launcher_inside_a_launcher_is_refused(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "missing.yaml", "--launch", "torchrun", "--nproc-per-node", "2"]) == 2
    assert "`--launch` inside a launcher" in capsys.readouterr().err
