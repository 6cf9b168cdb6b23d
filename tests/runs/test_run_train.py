"""One run end to end: what it leaves behind, how it resumes, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import Killed, numbers, run, small_config

from tokencredit import assign_credit
from tokencredit.batch.store import RecordStore
from tokencredit.errors import TokenCreditError
from tokencredit.runs import folders


def test_a_run_leaves_whole_results(model_folder: Path, tmp_path: Path) -> None:
    steps = []
    found = run(tmp_path / "run", small_config(model_folder), lambda done, note: steps.append(done))
    assert found["status"] == "finished"
    assert sum(steps) == 4
    lines = folders.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2, 4]
    assert all(len(line["metrics"]["per_problem"]) == 3 for line in lines if line["kind"] == "eval")
    assert "credit/PHR/tokens" in lines[-1]["metrics"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    # A finished run is not trained again.
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert run(tmp_path / "run", small_config(model_folder)) == found
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_records_hold_what_was_trained(model_folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(model_folder))
    records = list(RecordStore(tmp_path / "run" / "records"))
    assert [record.step for record in records] == [0, 1, 2, 3]
    for record in records:
        # The stored batch, put through the stored pipeline, gives the stored advantages.
        torch.testing.assert_close(assign_credit(record.pipeline, record.batch), record.advantages, rtol=0, atol=0)
        assert len(record.tokens) == len(record.prompts) == 8
        assert record.batch.group_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_run_resumes_to_the_same_numbers(model_folder: Path, tmp_path: Path, at: int) -> None:
    config = small_config(model_folder)
    run(tmp_path / "whole", config)

    seen = []

    def kill(done: int, note: str) -> None:
        seen.append(done)
        if len(seen) == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", config, kill)
    assert folders.read_json(tmp_path / "cut" / "run.json")["status"] == "running"
    # What a kill can leave behind: a torn line.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    run(tmp_path / "cut", config)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    stored = [list(RecordStore(tmp_path / name / "records")) for name in ("whole", "cut")]
    assert [record.step for record in stored[0]] == [record.step for record in stored[1]]
    assert all(torch.equal(a.advantages, b.advantages) for a, b in zip(*stored, strict=True))


def test_the_hosts_sampler_works_too(model_folder: Path, tmp_path: Path) -> None:
    config = small_config(model_folder, sampler="host", steps=1, timing="rollout")
    assert run(tmp_path / "run", config)["status"] == "finished"


def test_lora_runs(model_folder: Path, tmp_path: Path) -> None:
    config = small_config(model_folder, steps=1, lora={"r": 2, "target_modules": "all-linear"})
    assert run(tmp_path / "run", config)["status"] == "finished"
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    card = (tmp_path / "run" / "model" / "README.md").read_text()  # not the empty one that peft writes there
    assert "tokencredit" in card and "More Information Needed" not in card


@pytest.mark.parametrize("credit", ["exact", "arca", "attention", "0.5 * grpo + 0.5 * opd"])
def test_methods_that_ask_for_more(model_folder: Path, tmp_path: Path, credit: str) -> None:
    lora = {"r": 2, "target_modules": "all-linear"} if credit == "arca" else None
    teacher = {"kind": "model", "model": str(model_folder)} if "opd" in credit else None
    config = small_config(model_folder, steps=1, credit=credit, lora=lora, teacher=teacher)
    assert run(tmp_path / "run", config)["status"] == "finished"


def refuse(folder: Path, config: dict) -> str:
    with pytest.raises(TokenCreditError) as caught:
        run(folder, config)
    assert not folder.exists(), "something was written"
    return str(caught.value)


def test_other_settings_do_not_mix(model_folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(model_folder, steps=1))
    with pytest.raises(TokenCreditError, match="`seed` was 0, now 5"):
        run(tmp_path / "run", small_config(model_folder, steps=1, seed=5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(TokenCreditError, match="is not empty and holds no run"):
        run(tmp_path / "full", small_config(model_folder))


def test_refusals_come_before_anything_is_written(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert "no model folder at" in refuse(folder, small_config(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refuse(folder, small_config(tmp_path / "empty"))
    odd = {"num_generations": 4, "per_device_train_batch_size": 6}
    assert "cannot be split into micro-batches of 6 rows × 1 process" in refuse(
        folder, small_config(model_folder, trainer=odd)
    )
    alone = {"num_generations": 1}
    assert "must be at least 2" in refuse(folder, small_config(model_folder, trainer=alone))
    long = {"num_generations": 4, "max_completion_length": 100_000}
    assert "positions of the model" in refuse(folder, small_config(model_folder, trainer=long))
    sequence = {"num_generations": 4, "importance_sampling_level": "sequence"}
    assert "erases token credit" in refuse(folder, small_config(model_folder, trainer=sequence))
    assert "nothing here supplies" in refuse(folder, small_config(model_folder, credit="opd"))


def own(model: Path, dataset: Path, reward: str = "own_rewards:constant") -> dict:
    config = small_config(model, steps=1, reward=reward)
    return config | {"task": None, "dataset": {"path": str(dataset), "prompt": "question"}}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_datasets(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = tmp_path / "run"
    good = write_rows(tmp_path / "good.jsonl", [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)])
    assert "no dataset file" in refuse(folder, own(model_folder, tmp_path / "missing.jsonl"))
    assert "is empty" in refuse(folder, own(model_folder, write_rows(tmp_path / "none.jsonl", [])))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "1+1="}\n{"quest')
    assert "cannot read the dataset" in refuse(folder, own(model_folder, broken))
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"prompt_text": "1+1="}])
    assert "has no column 'question'; it has prompt_text" in refuse(folder, own(model_folder, wrong))
    blank = write_rows(tmp_path / "blank.jsonl", [{"question": ""}])
    assert "empty prompt" in refuse(folder, own(model_folder, blank))
    assert "cannot load the reward" in refuse(folder, own(model_folder, good, "own_rewards:missing"))
    config = own(model_folder, good)
    held_out = [{"question": f"{n}-1=", "answer": str(n - 1)} for n in range(1, 4)]
    config["dataset"]["evaluation"] = str(write_rows(tmp_path / "held_out.jsonl", held_out))
    assert run(folder, config)["status"] == "finished"
    evaluations = [line for line in folders.read_metrics(folder) if line["kind"] == "eval"]
    assert evaluations[-1]["metrics"]["reward"] == 0.5
    assert evaluations[-1]["metrics"]["success"] == 1.0  # every reward is above the threshold of 0
    shutil.rmtree(folder)
    with pytest.raises(TokenCreditError, match="'not_a_number' gave nan for row 0"):
        run(folder, own(model_folder, good, "own_rewards:not_a_number"))


def test_a_teacher_that_cannot_be_is_refused_first(model_folder: Path, tmp_path: Path) -> None:
    config = small_config(model_folder, credit="opd", teacher={"kind": "model", "modl": "x"})
    assert "did you mean 'model'" in refuse(tmp_path / "run", config)
