"""The folder of a run: what may change, how a run is extended and stopped, who holds the folder."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import Killed, numbers, run, small_config

from tokencredit.errors import TokenCreditError
from tokencredit.files import lock_folder, write_json, write_yaml
from tokencredit.runs import folders
from tokencredit.runs.callback import RunCallback
from tokencredit.runs.config.arguments import split_step
from tokencredit.runs.config.load import load_config
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.runs.stop import Stop, Stopped
from tokencredit.runs.train import plan_run, train_run


def refusal(folder: Path, config: RunConfig) -> str:
    with pytest.raises(TokenCreditError) as caught:
        folders.finished_run(folder, config)
    return str(caught.value)


def stored_run(folder: Path, config: dict, *, checkpoint: int | None, status: str = "running") -> RunConfig:
    """A folder as a run of two steps leaves it, without the training."""
    resolved = load_config(config)
    folders.prepare(folder, resolved)
    if checkpoint is not None:
        place = folder / (f"checkpoint-{checkpoint}" if status == "running" else folders.LAST)
        place.mkdir()
        (place / "trainer_state.json").write_text(f'{{"global_step": {checkpoint}}}')
    write_json(folder / "run.json", folders.read_json(folder / "run.json") | {"status": status, "steps": 4})
    return resolved


NEUTRAL = {
    "name": "another",
    "records": {"every": 3},
    "evaluation": {"every": 1, "problems": 3},
    "trainer": {"num_generations": 4, "logging_steps": 7, "save_steps": 9, "report_to": ["tensorboard"]},
}


def test_changes_that_move_no_number_keep_the_folder_usable(tmp_path: Path) -> None:
    base = small_config(Path("model"), trainer={"num_generations": 4})
    stored_run(tmp_path, base, checkpoint=2)
    assert folders.finished_run(tmp_path, load_config(base | NEUTRAL)) is None
    for key, value in (("seed", 9), ("credit", "grpo"), ("trainer", {"num_generations": 2})):
        assert f"`{key}" in refusal(tmp_path, load_config(base | {key: value}))


def test_a_folder_without_a_checkpoint_may_be_overwritten(tmp_path: Path) -> None:
    stored_run(tmp_path, small_config(Path("model")), checkpoint=None)
    other = load_config(small_config(Path("model"), seed=8, credit="grpo"))
    assert folders.finished_run(tmp_path, other) is None
    assert folders.prepare(tmp_path, other) is None
    assert folders.read_json(tmp_path / "run.json")["seed"] == 8


def test_more_steps_extend_a_run_and_fewer_are_refused(tmp_path: Path) -> None:
    base = small_config(Path("model"))
    config = stored_run(tmp_path, base, checkpoint=4, status="finished")
    assert folders.finished_run(tmp_path, config) is not None
    assert "`steps` was 4, now 3" in refusal(tmp_path, config.replace(steps=3))
    longer = config.replace(steps=6)
    assert folders.finished_run(tmp_path, longer) is None
    assert folders.prepare(tmp_path, longer) == tmp_path / "checkpoint-4"


def test_a_finished_run_of_an_earlier_version_says_how_to_go_on(tmp_path: Path) -> None:
    config = stored_run(tmp_path, small_config(Path("model")), checkpoint=None, status="finished")
    assert "without its last checkpoint" in refusal(tmp_path, config.replace(steps=6))


def test_a_stored_config_without_later_keys_is_the_same_run(tmp_path: Path) -> None:
    config = stored_run(tmp_path, small_config(Path("model")), checkpoint=2)
    old = {key: value for key, value in config.to_mapping().items() if key != "lora"}
    del old["evaluation"]["threshold"]
    write_yaml(tmp_path / "config.yaml", old)
    assert folders.finished_run(tmp_path, config) is None


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", b"\0\0\0", "is not valid YAML"),
        ("config.yaml", b"\xff", "is not UTF-8"),
        ("config.yaml", b"[]", "holds no config of a run"),
        ("config.yaml", b"steps: x", "holds no config of a run"),
        ("run.json", b"", "cannot read"),
        ("run.json", b"[1]", "holds no JSON object"),
        ("run.json", b"\xff\xfe", "cannot read"),
    ],
)
def test_damaged_folders_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    config = stored_run(tmp_path, small_config(Path("model")), checkpoint=2)
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(tmp_path, config)


@pytest.mark.parametrize("line", [b"{}", b'{"step": -1, "kind": "train", "metrics": {}}', b"\xff", b"[" * 50_000, b"3"])
def test_damaged_metrics_are_told_in_one_line(tmp_path: Path, line: bytes) -> None:
    good = b'{"step": 1, "kind": "train", "metrics": {}}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(TokenCreditError, match=r"metrics\.jsonl"):
        folders.read_metrics(tmp_path)


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(small_config(Path("model")))
    assert "is a file" in refusal(tmp_path / "file", config)
    with pytest.raises(TokenCreditError, match="cannot create the folder"):
        folders.prepare(tmp_path / "file" / "below", config)
    with pytest.raises(TokenCreditError, match="cannot create the folder"):
        folders.prepare(Path("/proc/nothing/here"), config)


def test_two_runs_in_one_folder(model_folder: Path, tmp_path: Path) -> None:
    other = "import sys, time; from pathlib import Path; from tokencredit.files import lock_folder\n"
    other += f"with lock_folder(Path({str(tmp_path / 'run')!r})):\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(TokenCreditError, match=f"in use by another process .pid {process.pid}."):
            run(tmp_path / "run", small_config(model_folder, steps=1))
        process.kill()
    assert run(tmp_path / "run", small_config(model_folder, steps=1))["status"] == "finished"  # the lock died with it
    with lock_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint(model_folder: Path, tmp_path: Path, number: int) -> None:
    config = small_config(model_folder)
    config["trainer"] |= {"save_steps": 500}
    run(tmp_path / "whole", config)

    def send(done: int, note: str) -> None:
        if done:
            os.kill(os.getpid(), number)

    with Stop() as stop, pytest.raises(Stopped, match="stopped after step 2 of 4") as caught:
        train_run(load_config(config), tmp_path / "cut", send, stop=stop)
    assert caught.value.code == 128 + number
    assert folders.last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    run(tmp_path / "cut", config)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_signals_outside_training(capsys: pytest.CaptureFixture) -> None:
    with Stop(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    with Stop(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with Stop() as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the same Ctrl-C on: too soon to be a second one
        assert stop.number == signal.SIGINT
        stop._at -= 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "saving a checkpoint" in capsys.readouterr().err


def test_a_stop_without_a_main_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    worker = threading.Thread(target=lambda: Stop().__enter__())
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_extended(model_folder: Path, tmp_path: Path) -> None:
    config = small_config(model_folder, steps=2)
    run(tmp_path / "run", config)
    assert (tmp_path / "run" / "last-checkpoint").is_dir()
    longer = run(tmp_path / "run", config | {"steps": 3})
    assert longer["steps"] == 3
    lines = folders.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]


def test_a_start_that_fails_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    bad = small_config(model_folder, lora={"r": 2, "target_modules": ["no_such_layer"]})
    with pytest.raises(TokenCreditError, match="no_such_layer"):
        run(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()
    for changes, expected in (
        ({"lora": {"rank": 2}}, "unknown field of `lora`"),
        ({"lora": {"r": 0}}, "`lora.r` must be a whole number"),
        ({"trainer": {"num_generations": 4, "report_to": "wandb"}}, "wandb, which is not installed"),
        ({"trainer": {"num_generations": 4, "report_to": "wandbb"}}, "did you mean 'wandb'?"),
        ({"trainer": {"num_generations": 4, "use_vllm": True}}, "needs vLLM"),
        ({"trainer": {"num_generations": 4, "optim": "adamm"}}, "TRL refuses the trainer section"),
    ):
        with pytest.raises(TokenCreditError, match=expected):
            run(tmp_path / "run", small_config(model_folder, **changes))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "trainer", "expected"),
    [
        ("tiny", {}, (32, 1)),
        ("org/model", {}, (8, 4)),
        ("org/model", {"per_device_train_batch_size": 2}, (2, 16)),
        ("tiny", {"gradient_accumulation_steps": 8}, (4, 8)),
        ("org/model", {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, (16, 2)),
    ],
)
def test_a_step_keeps_its_rows(model: str, trainer: dict, expected: tuple[int, int]) -> None:
    config: dict[str, Any] = {"task": "countdown", "model": model, "prompts_per_step": 8}
    assert split_step(load_config(config | {"trainer": {"num_generations": 4} | trainer}))[:2] == expected


def test_a_step_that_cannot_be_split() -> None:
    config: dict[str, Any] = {"task": "countdown", "prompts_per_step": 8}
    both = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for trainer in (both, {"num_generations": 4, "gradient_accumulation_steps": 5}):
        with pytest.raises(TokenCreditError, match="the 32 rows of a step"):
            split_step(load_config(config | {"trainer": trainer}))


def test_the_plan_says_what_will_happen(model_folder: Path, tmp_path: Path) -> None:
    plans: list[Any] = []
    train_run(load_config(small_config(model_folder, steps=1)), tmp_path / "run", show_plan=plans.append)
    rows = dict(plans[0].rows)
    assert "0.001, linear, 1 steps" in rows["learning rate"]
    assert "2 prompts × 4 generations = 8 rows = micro-batch 8 × accumulation 1 × processes 1" in rows["step"]
    assert "at most 6 tokens" in rows["response"]
    assert "3 problems of the task's test split" in rows["evaluation"]
    assert rows["first prompt"].startswith(f"{len(rows['first prompt'].partition(': ')[2]) - 2} tokens")
    dry = plan_run(load_config(small_config(model_folder, steps=1, lora={"r": 2})), tmp_path / "dry")
    assert "of them trained" in dict(dry.rows)["model"]
    assert not (tmp_path / "dry").exists()


class Loop:
    """What a callback is shown of the host's state."""

    global_step, max_steps, is_world_process_zero = 1, 9, True
    max_completion_length, steps_per_generation, gradient_accumulation_steps, num_iterations = 8, 1, 1, 1
    should_log = should_save = should_training_stop = False


def test_progress_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    seen: list[tuple[int, str]] = []
    config = load_config({"task": "countdown"})
    callback = RunCallback(tmp_path, config, None, lambda done, note: seen.append((done, note)))
    state = Loop()
    state.should_log = True
    logs = {"loss": 0.5, "reward": 0.0, "frac_reward_zero_std": 1.0}
    logs |= {"completions/clipped_ratio": 0.75, "completions/mean_length": 7.6}
    for _ in range(2):
        callback.on_step_end(state, state, state)
        callback.on_log(state, state, state, logs=logs)
    assert seen == [(1, "reward 0.000  loss 0.5000  length 8  cut off 75%")] * 2
    told = capsys.readouterr().err
    assert told.count("75% of the responses were cut off at trainer.max_completion_length=8") == 1
    assert told.count("all responses to a prompt have the same reward") == 1


def test_a_run_of_this_process_does_not_look_at_its_parent(tmp_path: Path) -> None:
    callback = RunCallback(tmp_path, load_config({"task": "countdown"}), None, None)
    assert callback.parent is None  # so that `nohup … &` survives its shell


def test_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from tokencredit.runs.train import quiet

    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    quiet()
    assert constants.HF_HUB_DISABLE_TELEMETRY
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # the user wants it
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    quiet()
    assert not constants.HF_HUB_DISABLE_TELEMETRY


def test_a_killed_run_still_goes_on_when_only_logging_changed(model_folder: Path, tmp_path: Path) -> None:
    def kill(done: int, note: str) -> None:
        if folders.last_checkpoint(tmp_path / "run") is not None:
            raise Killed

    config = small_config(model_folder)
    with pytest.raises(Killed):
        run(tmp_path / "run", config, kill)
    config["trainer"] = config["trainer"] | {"logging_steps": 2}
    assert run(tmp_path / "run", config | {"name": "renamed"})["steps"] == 4
