"""The plugin is found by `import verl` alone, in the driver and in Ray workers, and a broken one is loud."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from tokencredit.adapters.verl import doctor as verl_doctor

REGISTERED = """
import verl
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
print(sorted(name for name in TRAINER_REGISTRY if name.startswith("tokencredit_")))
"""

# The trainer's module cannot be imported, as with a moved seam.
BROKEN = """
import sys
sys.modules["tokencredit.adapters.verl.loss"] = None
import verl
from verl.trainer.ppo.v1 import get_trainer_cls
from tokencredit.adapters.verl.doctor import diagnose
print([check["found"] for check in diagnose(ray_worker=False) if check["status"] == "fail"])
try:
    get_trainer_cls("tokencredit_separate_async")({})
except ValueError as error:
    print(type(error).__name__, error)
"""


STATE = "from tokencredit.adapters.verl.doctor import plugin_state; print(plugin_state())"


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_verl_registers_our_trainers() -> None:
    assert str(sorted(verl_doctor.NAMES)) in run(REGISTERED).stdout


def test_doctor_does_not_load_what_verl_did_not() -> None:
    assert run(STATE).stdout.strip() == "loaded"
    assert run(STATE, VERL_USE_EXTERNAL_PLUGINS="none").stdout.startswith("verl did not load it: no entry point")


def test_a_broken_plugin_is_reported_by_stderr_doctor_and_trainer() -> None:
    done = run(BROKEN)
    assert "tokencredit: the verl plugin did not load" in done.stderr
    found, raised = done.stdout.strip().splitlines()[:2]
    assert found.startswith("['ModuleNotFoundError: ") and "verl_loss" in found
    assert raised.startswith("TokenCreditError the verl plugin of tokencredit did not load: ModuleNotFoundError")


@ray.remote
class Worker:
    def trainers(self) -> list[str]:
        import verl.trainer.ppo.v1.trainer_base as base

        return sorted(name for name in base.TRAINER_REGISTRY if name.startswith("tokencredit_"))


def test_ray_actors_see_the_plugin(store: None) -> None:
    assert ray.get(Worker.remote().trainers.remote(), timeout=200) == sorted(verl_doctor.NAMES)


# The command of docs/verl.md: its task runner is an actor of a Ray of its own. verl asks for batch sizes first.
MAIN = [
    *("-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8"),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    *("ray_kwargs.ray_init.num_cpus=4", "+ray_kwargs.ray_init.include_dashboard=False"),
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "trainer.v1.trainer_mode=tokencredit_sync",
]


def test_verls_task_runner_builds_our_trainer_without_user_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *MAIN, "+credit=happo"], capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "TaskRunnerV1.run" in done.stderr
    assert "TokenCreditError: unknown credit method 'happo', did you mean 'hapo'?" in done.stderr


def test_doctor_finds_nothing_to_mend(store: None) -> None:
    checks = verl_doctor.diagnose()
    assert [check for check in checks if check["status"] == "fail"] == []
    assert checks[-1]["name"] == "plugin in a Ray worker" and checks[-1]["found"] == "loaded"


def test_doctor_names_a_switched_off_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    (failed,) = [check for check in verl_doctor.diagnose(ray_worker=False) if check["status"] == "fail"]
    assert failed["name"] == "VERL_USE_EXTERNAL_PLUGINS" and "unset" in failed["fix"]


def test_doctor_looks_for_what_workers_import_from_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    monkeypatch.setattr(trl, verl_doctor.VALUE_HEAD, object, raising=False)
    assert verl_doctor._beside_trl()["status"] == "ok"
    monkeypatch.delattr(trl, verl_doctor.VALUE_HEAD)
    found = verl_doctor._beside_trl()
    assert found["status"] == "note" and "AutoModelForCausalLMWithValueHead" in found["found"]
    monkeypatch.setattr(verl_doctor, "distributions", lambda name: [])
    assert verl_doctor._beside_trl()["found"] == "not installed"


def test_doctor_names_a_moved_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    def moved(self: Any, data: Any) -> None: ...

    monkeypatch.setattr(PPOTrainer, "_compute_advantage", moved)
    (failed,) = [check for check in verl_doctor.diagnose(ray_worker=False) if check["status"] == "fail"]
    assert "PPOTrainer._compute_advantage" in failed["name"] and "('self', 'data')" in failed["found"]
