"""The seams of verl that the plugin stands on, by signature and by behaviour; the data store has its own suite."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
from seams import expect, moved
from verl_setup import GRPO, compose

from tokencredit.adapters.verl import checks as verl_checks
from tokencredit.adapters.verl import doctor as verl_doctor
from tokencredit.adapters.verl.settings import read_settings

BUILT_IN = ("sync", "colocate_async", "separate_async")
# Options of verl that the adapter reads or names in a remedy.
OPTIONS = (
    "algorithm.adv_estimator",
    "algorithm.rollout_correction.bypass_mode",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.calculate_log_probs",
    "actor_rollout_ref.actor.use_kl_loss",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
    "actor_rollout_ref.actor.entropy_from_logits_with_chunking",
    "distillation.enabled",
    "distillation.distillation_loss.loss_mode",
    "distillation.distillation_loss.use_task_rewards",
    "trainer.use_v1",
    "trainer.v1.trainer_mode",
)


@pytest.mark.parametrize("seam", verl_doctor.SEAMS, ids=lambda seam: f"{seam[0]}.{seam[1]}")
def test_signatures(seam: tuple[str, str, tuple[str, ...]]) -> None:
    found = verl_doctor._seam(*seam)
    assert found["status"] == "ok", moved("verl", found["name"], found["found"], seam[2])


def test_the_version_is_one_that_is_supported() -> None:
    verl_checks.check_versions()


def test_import_verl_loads_the_plugin() -> None:
    expect("verl", "entry-point group verl.plugins", verl_doctor.plugin_state(), "loaded")


def test_the_registry_holds_verls_own_trainers() -> None:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    missing = [name for name in BUILT_IN if name not in TRAINER_REGISTRY]
    expect("verl", "TRAINER_REGISTRY", missing, [])


def test_the_base_class_looks_at_the_name_of_the_mode() -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer)
    assert "trainer_mode" in source, moved("verl", "PPOTrainer", "no trainer_mode", "comparisons of trainer_mode")


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str) -> None:
    value: Any = compose(*GRPO)
    for part in option.split("."):
        assert part in value, moved("verl", f"option {option}", "missing", "an option of ppo_trainer.yaml")
        value = value[part]


def test_our_group_composes_beside_verls() -> None:
    config = compose(*GRPO, "trainer.v1.trainer_mode=tokencredit_sync", "+credit.method=hapo", "+credit.args.alpha=0.3")
    expect("verl", "a top-level group of its config", dict(read_settings(config).args), {"alpha": 0.3})


def test_what_the_driver_holds_of_a_batch() -> None:
    from transfer_queue import KVBatchMeta

    wanted = {"keys", "tags", "partition_id"}
    expect("verl", "fields of KVBatchMeta", wanted & {item.name for item in fields(KVBatchMeta)}, wanted)
