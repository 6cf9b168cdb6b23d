"""What cannot work is refused before workers start, by option, value and remedy. No Ray."""

from typing import Any

import pytest
from omegaconf import DictConfig
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl_setup import GRPO, build_trainer, compose, credit_config

from tokencredit import get_pipeline
from tokencredit.adapters.verl import checks as verl_checks
from tokencredit.adapters.verl.settings import read_settings
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.pipeline import Pipeline

ACTOR = "actor_rollout_ref.actor"
TEACHER = ("distillation.enabled=True", "distillation.distillation_loss.distillation_loss_coef=0.0")

# Overrides, what the message says, what the hint says.
REFUSED: list[tuple[list[str], str, str]] = [
    (["+credit=hapo", "algorithm.adv_estimator=gae"], "adv_estimator=gae", "adv_estimator=grpo"),
    (
        ["+credit=surprisal", "algorithm.rollout_correction.bypass_mode=True"],
        "bypass_mode=True skips verl's scoring pass",
        "bypass_mode=False",
    ),
    (["+credit=hapo", f"{ACTOR}.policy_loss.loss_mode=geo_mean"], "loss_mode=geo_mean averages", "loss_mode=vanilla"),
    (["+credit=hapo", "actor_rollout_ref.rollout.n=1"], "rollout.n must be at least 2 for hapo, got 1", "rollout.n=8"),
    (["+credit=policy_divergence", f"{ACTOR}.use_kl_loss=False"], "needs verl's reference worker", "use_kl_loss=True"),
    (["+credit=opd"], "needs a teacher, got distillation.enabled=False", "+credit.teacher=reference"),
    (
        ["+credit=opd", *TEACHER, "distillation.distillation_loss.use_task_rewards=False"],
        "use_task_rewards=False drops the policy loss",
        "use_task_rewards=True",
    ),
    (
        ["+credit=opd", *TEACHER, "distillation.distillation_loss.loss_mode=forward_kl_topk"],
        "loss_mode=forward_kl_topk stores no log-prob",
        "loss_mode=k1",
    ),
    (["+credit=atpo"], "atpo needs `importances`, which nothing in verl supplies", "CreditGRPOTrainer"),
    (["+credit=arca"], "arca needs `adapter_residuals`, and the policy has no adapter", "lora_rank=16"),
    (
        ["+credit=attention", "actor_rollout_ref.actor.strategy=megatron"],
        "attention needs `attention_entropies` from the workers, got actor_rollout_ref.actor.strategy=megatron",
        "strategy=fsdp",
    ),
    (["+credit.method=fipo", "+credit.timing=rollout"], "the policy that is being updated", "timing=auto"),
    (["+credit.method=hapo", "+credit.timing=update"], "looks at whole groups", "timing=rollout"),
    (["+credit.method=random_tokens", "+credit.timing=update"], "draws random numbers", "timing=rollout"),
    (
        ["+credit.method=fipo", "+credit.records=x"],
        "credit.records='x' is written on the driver",
        "leave credit.records",
    ),
    (["+credit=fipo", *TEACHER], "distillation.enabled=True puts another loss there", "distillation.enabled=False"),
    (["+credit=happo"], "unknown credit method 'happo', did you mean 'hapo'?", ""),
    (["+credit.methd=hapo"], "unknown credit option 'methd', did you mean 'method'?", ""),
    (["+credit.args.alpha=0.3"], "`credit.method` is missing", "+credit.method=hapo"),
    (["+credit.method=hapo", "+credit.args.alfa=0.3"], "hapo has no hyperparameter 'alfa'", ""),
    (["+credit.method=hapo", "+credit.args=3"], "`credit.args` is a mapping, got 3", "+credit.args.alpha=0.3"),
    (["+credit.method=[group_normalized]", "+credit.args.eps=1.0"], "belongs to a method given by name", "top_entropy"),
    (["+credit.method=hapo", "+credit.teacher=refrence"], "did you mean 'reference'?", ""),
    (["+credit.method=hapo", "+credit.timing=late"], "unknown credit.timing 'late'", ""),
    (["+credit.method=hapo", "+credit.record_every=0"], "`credit.record_every` must be a whole number from 1", ""),
    (["+credit=hapo", "+tokencredit=hapo"], "the same group twice", "keep `+credit"),
    ([], "no credit method is given", "+credit=hapo"),
]


@pytest.mark.parametrize(("overrides", "message", "hint"), REFUSED)
def test_refusals_name_option_value_and_remedy(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(TokenCreditError) as raised:
        build_trainer(credit_config(*overrides))
    assert message in raised.value.message
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize("overrides", [["+credit=hapo"], ["+tokencredit.method=hapo"]])
def test_credit_with_one_of_verls_own_trainers_is_refused(overrides: list[str]) -> None:
    config = compose(*GRPO, *overrides, "trainer.v1.trainer_mode=sync")
    with pytest.raises(TokenCreditError, match=r"assigns no credit(.|\n)*tokencredit_sync"):
        get_trainer_cls("sync")(config)


def test_verls_old_trainer_is_refused() -> None:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    config = credit_config("+credit=hapo", "trainer.use_v1=False")
    with pytest.raises(TokenCreditError, match=r"trainer.use_v1=False(.|\n)*use_v1=True"):
        RayPPOTrainer(config, None, {}, None)


@pytest.mark.parametrize(
    ("mode", "overrides", "buffer", "sync_steps"),
    [
        ("sync", [], ReplayBuffer, 1),
        ("colocate_async", [], ReplayBufferAsync, 1),
        (
            "separate_async",
            [
                "trainer.v1.separate_async.parameter_sync_step=2",
                "data.train_batch_size=16",
                f"{ACTOR}.ppo_mini_batch_size=8",
                "actor_rollout_ref.rollout.nnodes=1",
                "actor_rollout_ref.rollout.n_gpus_per_node=1",
                "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
            ],
            ReplayBufferAsync,
            2,
        ),
    ],
)
def test_the_base_class_is_told_its_own_mode(mode: str, overrides: list[str], buffer: type, sync_steps: int) -> None:
    trainer = build_trainer(credit_config("+credit=hapo", *overrides, mode=f"tokencredit_{mode}"))
    assert trainer.trainer_mode == mode == trainer.config.trainer.v1.trainer_mode
    assert type(trainer.replay_buffer) is buffer
    assert trainer.parameter_sync_step == sync_steps


SPELLINGS: list[tuple[list[str], Any]] = [
    (["+credit=hapo"], get_pipeline("hapo")),
    (["+credit.method=hapo", "+credit.args.alpha=0.3"], get_pipeline("hapo", alpha=0.3)),
    (["+credit.method=hapo", "+credit.args.entropy_capacity.alpha=0.3"], get_pipeline("hapo", alpha=0.3)),
    (["+tokencredit.method='0.5 * grpo + 0.5 * dr_grpo'"], 0.5 * get_pipeline("grpo") + 0.5 * get_pipeline("dr_grpo")),
    (
        ["+credit=[group_normalized,{top_entropy:{keep:0.3}}]"],
        Pipeline.of("group_normalized", {"top_entropy": {"keep": 0.3}}),
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), SPELLINGS)
def test_spellings_of_a_pipeline(overrides: list[str], expected: Pipeline) -> None:
    found = read_settings(compose(*overrides)).pipeline()
    assert found.to_config() == expected.to_config()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["+credit=hapo", f"{ACTOR}.entropy_from_logits_with_chunking=False"], "off by up to 0.2 nat"),
        (["+credit=opd", "distillation.enabled=True", "distillation.distillation_loss.loss_mode=k1"], "adds its own"),
    ],
)
def test_what_is_only_changed_is_warned_of(overrides: list[str], text: str) -> None:
    config: DictConfig = credit_config(*overrides)
    settings = read_settings(config)
    with pytest.warns(UserWarning, match=text):
        verl_checks.check_all(settings.pipeline(), settings, config)


@pytest.mark.parametrize("version", ["0.8.0", "0.10.0", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(TokenCreditError, match=f"verl {version} is outside the supported range"):
        verl_checks.check_versions(version)
