"""Methods side by side: paired seeds, results, resume, refusals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.small_runs import small_config, write_yaml

from tokencredit import files
from tokencredit.cli.compare import conclusions, print_table, show, title
from tokencredit.errors import TokenCreditError
from tokencredit.lab import data as lab_data
from tokencredit.pipeline.labels import label_of
from tokencredit.runs import folders
from tokencredit.runs.compare import check_first, compare_runs, headroom, plan_runs, summarise_runs, workers
from tokencredit.runs.config.load import load_config
from tokencredit.runs.evaluation import summarise


def test_plans_pair_methods_within_a_seed() -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", {"hapo": {"alpha": 1.0}}], range(2))
    assert [plan.path for plan in plans] == [
        "grpo/seed-0",
        "hapo_alpha_1.0_/seed-0",
        "grpo/seed-1",
        "hapo_alpha_1.0_/seed-1",
    ]
    assert all(plan.config.steps == plans[0].config.steps for plan in plans)
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


def write_run(folder: Path, evaluations: list[dict], rewards: list[float]) -> None:
    folder.mkdir(parents=True)
    for step, metrics in enumerate(evaluations):
        folders.append_metrics(folder, step, "eval", metrics)
    for step, reward in enumerate(rewards, 1):
        folders.append_metrics(folder, step, "train", {"reward": reward})


def exact_evaluation(values: list[float]) -> dict:
    return {"success": sum(values) / len(values), "per_problem": values}


def test_results_by_hand(tmp_path: Path) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(2))
    # end success: grpo .2 .4 | .4 .6 -> mean .4; hapo .1 higher everywhere -> difference exactly .1, no spread
    ends = {("grpo", 0): [0.2, 0.4], ("grpo", 1): [0.4, 0.6], ("hapo", 0): [0.3, 0.5], ("hapo", 1): [0.5, 0.7]}
    for plan in plans:
        evaluations = [exact_evaluation([0.1, 0.1]), exact_evaluation(ends[plan.label, plan.seed])]
        write_run(tmp_path / plan.path, evaluations, [0.25 + 0.1 * plan.seed])
    grpo, hapo = summarise_runs(plans, tmp_path)
    assert grpo["measure"] == "success"
    assert grpo["start"]["mean"] == pytest.approx(0.1)
    assert grpo["end"]["mean"] == pytest.approx(0.4)
    assert grpo["difference"] is None
    assert grpo["reward"] == pytest.approx(0.3)
    # two seeds, .25 and .35: .3 ± t(.975, 1) · .05 = .3 ± .635
    assert grpo["reward_interval"] == pytest.approx({"mean": 0.3, "low": 0.3 - 0.6353, "high": 0.3 + 0.6353}, abs=1e-4)
    assert hapo["difference"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert grpo["end"]["low"] < 0.4 < grpo["end"]["high"]


def test_rewards_that_are_not_0_or_1_are_called_by_their_name(tmp_path: Path) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(2))
    for plan in plans:
        evaluation = summarise([[2.0, 4.0], [None, 1.0]], threshold=0.0)
        write_run(tmp_path / plan.path, [evaluation, evaluation], [0.5])
    rows = summarise_runs(plans, tmp_path)
    assert [row["measure"] for row in rows] == ["mean reward", "mean reward"]
    assert rows[1]["end"]["mean"] == 2.0  # of 3 and 1
    assert title(rows) == "mean reward on held-out problems, 95 % t intervals over 2 seeds"


def test_problems_that_were_not_scored_are_not_paired_with_others(tmp_path: Path) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(2))
    for plan in plans:
        rewards = [[0.0], [1.0], [None]] if plan.label == "grpo" else [[None], [0.5], [0.5]]
        write_run(tmp_path / plan.path, [summarise(rewards, 0.0)], [0.5])
    _, hapo = summarise_runs(plans, tmp_path)
    assert hapo["difference"]["mean"] == -0.5  # the second problem is the only one that both have


def test_without_an_evaluation_rewards_are_compared_and_the_table_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(2))
    for plan in plans:
        write_run(tmp_path / plan.path, [], [0.1 * (plan.seed + (plan.label == "hapo"))] * 12)
    rows = summarise_runs(plans, tmp_path)
    assert [row["measure"] for row in rows] == [None, None]
    assert rows[1]["reward_difference"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    print_table(rows)
    out = " ".join(capsys.readouterr().out.split())
    assert "training reward (there is no evaluation set), 95 % t intervals over 2" in out
    assert "held-out problems" not in out
    assert "dataset.evaluation" in conclusions({"results": rows})[0]


def test_one_seed_has_no_interval_and_the_title_says_so(tmp_path: Path) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo"], range(1))
    for plan in plans:
        write_run(tmp_path / plan.path, [exact_evaluation([0.1, 0.3])], [0.5])
    rows = summarise_runs(plans, tmp_path)
    assert show(rows[0]["end"]) == "0.200"
    assert title(rows) == "success on held-out problems, one seed: no intervals"


def test_labels_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "label": "f([a, b])[/b]\x1b[31m",
        "seeds": 1,
        "measure": "success",
        "difference": None,
        "reward": 0.5,
    }
    print_table([row])
    out = capsys.readouterr().out
    assert "f([a, b])[/b]\\x1b[31m" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.10, 0.11, 0.09], "headroom: perfect credit gains"),
        ([0.10, -0.11, 0.02], "undecidable here: no headroom"),
        ([-0.10, -0.11, -0.09], "undecidable here: no headroom"),
    ],
)
def test_headroom(tmp_path: Path, gains: list[float], said: str) -> None:
    plans = plan_runs(load_config({"task": "countdown"}), ["grpo", "hapo", "exact"], range(3))
    for plan in plans:
        gain = gains[plan.seed] if plan.label == "exact" else 0.0
        write_run(tmp_path / plan.path, [exact_evaluation([0.5 + gain, 0.6 + gain])], [0.5])
    rows = summarise_runs(plans, tmp_path)
    found = headroom(rows, plans, tmp_path)
    assert found is not None and found["verdict"] == said
    assert found["difference"]["mean"] == pytest.approx(sum(gains) / 3)
    assert said in conclusions({"results": rows, "headroom": found})[0]
    without = [plan for plan in plans if plan.label != "exact"]
    assert headroom(summarise_runs(without, tmp_path), without, tmp_path) is None


def test_a_method_may_bring_its_own_teacher(model_folder: Path) -> None:
    teacher = {"kind": "model", "model": str(model_folder)}
    config = load_config(small_config(model_folder, teacher={"kind": "self", "template": "answer"}))
    plans = plan_runs(config, ["dasd", {"credit": {"opd": {}}, "teacher": teacher}], range(1))
    assert [plan.config.teacher["kind"] for plan in plans] == ["self", "model"]
    assert [plan.label for plan in plans] == ["dasd", "opd"]
    with pytest.raises(TokenCreditError, match="unknown key of a method 'techer', did you mean 'teacher'"):
        plan_runs(config, [{"credit": "opd", "techer": teacher}], range(1))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"kind": "self", "template": "answerr"}, "did you mean 'answer'"),
        ({"kind": "modl"}, "did you mean 'model'"),
        ({"kind": {}}, "`teacher` needs a `kind`"),
    ],
)
def test_a_wrong_teacher_is_refused_before_a_model_is_loaded(
    teacher: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_data, "load_model", lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(TokenCreditError) as caught:
        check_first(plan_runs(small_config(tmp_path, teacher=teacher), ["opd"], range(1)), tmp_path / "out")
    assert said in str(caught.value)


def test_the_first_check_loads_the_model_once_for_all_methods(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_model = lab_data.load_model
    monkeypatch.setattr(lab_data, "load_model", lambda path: loaded.append(path) or load_model(path))
    config = small_config(model_folder)
    check_first(plan_runs(config, ["grpo", "hapo", "exact"], range(2)), tmp_path / "out")
    assert loaded == [str(model_folder)]
    with pytest.raises(TokenCreditError, match=r"arca: .*adapter_residuals"):  # needs LoRA
        check_first(plan_runs(config, ["grpo", "arca"], range(1)), tmp_path / "out")


def test_folders_of_labels_stay_inside_and_are_short() -> None:
    config = load_config({"task": "countdown"})
    many = ["group_normalized", *({"constant_scale": {"scale": 1.5 + number}} for number in range(12))]
    more = [*many[:-1], {"constant_scale": {"scale": 99.5}}]
    paths = [plan.path for plan in plan_runs(config, [many, more], range(1))]
    assert len(set(paths)) == 2
    assert all(len(path.split("/")[0].encode()) <= 240 for path in paths)


# -- processes -------------------------------------------------------------------------------------------------------


def test_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert workers.default_jobs(2, lab=True) == 8
    assert workers.default_jobs(None, lab=False) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_devices() == ["0", "1", "2", "3"]
    assert workers.default_jobs(1, lab=True) == workers.default_jobs(1, lab=False) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert workers.visible_devices() == ["5", "GPU-abc"]


def test_every_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Process:
        exitcode = None

        def start(self) -> None:
            seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

        def is_alive(self) -> bool:
            return False

        def join(self, timeout: float) -> None: ...

    class Pipe:
        def send(self, job: object) -> None: ...
        def close(self) -> None: ...
        def poll(self) -> bool:
            return True

        def recv(self) -> None: ...

    class Context:
        Pipe = staticmethod(lambda: (Pipe(), Pipe()))
        Process = staticmethod(lambda **options: Process())

    monkeypatch.setattr(workers, "get_context", lambda kind: Context())
    monkeypatch.setattr(workers, "visible_devices", lambda: ["3", "7"])
    monkeypatch.setattr(workers, "POLL", 0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [workers.Job(f"run {number}", {"threads": 1}, "") for number in range(5)]
    workers.run_jobs(jobs, 2, lambda: None)
    assert seen == ["3", "7"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def command(config: Path, out: Path) -> list[str]:
    credit = ["--credit", "grpo", "hapo", "--seeds", "1", "--jobs", "1", "--json"]
    return [sys.executable, "-m", "tokencredit.cli.main", "compare", str(config), *credit, "--out", str(out)]


def values(folder: Path) -> list[dict]:
    return [line["metrics"] for line in folders.read_metrics(folder) if line["kind"] == "eval"]


def living(session: int) -> list[int]:
    """Living processes of a session; a zombie has nothing left to run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if state != "Z" and int(owner) == session else []
    return found


def test_a_killed_comparison_resumes_to_the_same_numbers(model_folder: Path, tmp_path: Path) -> None:
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
    while living(cut.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not living(cut.pid)
    subprocess.run(command(config, tmp_path / "cut"), capture_output=True, check=True)
    for path in ("grpo/seed-0", "hapo/seed-0"):
        assert values(tmp_path / "cut" / path) == values(tmp_path / "whole" / path)
    assert (tmp_path / "cut" / "report.html").stat().st_size > 10_000


class Gone:
    """A process and a pipe of a worker that a signal ended."""

    def __init__(self, code: int | None) -> None:
        self.exitcode = code

    def poll(self) -> bool:
        return True

    def recv(self) -> None:
        raise EOFError

    def join(self, timeout: float) -> None: ...


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "grpo/seed-0: its process was ended by SIGKILL"),
        (-signal.SIGSEGV, "grpo/seed-0: its process was ended by SIGSEGV"),
        (3, "grpo/seed-0: its process ended with exit code 3"),
    ],
)
def test_a_process_that_is_gone_is_named(code: int, said: str) -> None:
    worker = object.__new__(workers._Worker)
    worker.process = worker.pipe = Gone(code)
    worker.job = workers.Job("grpo/seed-0", {}, "")
    with pytest.raises(TokenCreditError, match=said) as caught:
        worker.poll()
    assert caught.value.hint is not None and "goes on from the last checkpoint" in caught.value.hint


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_comparison_goes_on(model_folder: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "small.yaml", small_config(model_folder, steps=30, records={"every": 0}))
    running = subprocess.Popen(
        command(config, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    first = tmp_path / "out" / "grpo" / "seed-0"
    deadline = time.monotonic() + 120
    while len(values(first)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(TokenCreditError, match="is in use by another process"), files.lock_folder(tmp_path / "out"):
        pass
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    worker = next(pid for pid in children if b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "error: grpo/seed-0: its process was ended by SIGKILL" in told
    assert "Traceback" not in told
    assert "goes on from the last checkpoint" in told


def test_two_comparisons_in_one_folder_are_refused(model_folder: Path, tmp_path: Path) -> None:
    plans = plan_runs(load_config(small_config(model_folder)), ["grpo"], range(1))
    with files.lock_folder(tmp_path / "out"), pytest.raises(TokenCreditError, match="is in use by another process"):
        compare_runs(plans, tmp_path / "out")
