"""The advantages that TRL trains on are the pure function of what TRL measured."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl_setup import config, reward, saved_model, train, trainer

from tokencredit import TokenCreditError, assign_credit, get_pipeline
from tokencredit.adapters import trl_checks
from tokencredit.adapters.trl import CreditGRPOTrainer
from tokencredit.lab.rollout import rollout_func
from tokencredit.store import RecordStore


def records(folder: Path, credit: Any, timing: str = "auto", **changes: Any) -> list:
    built = trainer(
        CreditGRPOTrainer, config(folder / "out", **changes), credit=credit, timing=timing, records=folder / "records"
    )
    built.train()
    return list(RecordStore(folder / "records"))


def test_both_timings_give_the_same_credit_on_policy(tmp_path: Path) -> None:
    update = records(tmp_path / "a", "hapo", "update")
    rollout = records(tmp_path / "b", "hapo", "rollout")
    assert len(update) == len(rollout) == 3
    for one, two in zip(update, rollout, strict=True):
        assert torch.equal(one.batch.response_ids, two.batch.response_ids)
        # Same policy, another forward: float32 scoring of another batch shape.
        torch.testing.assert_close(one.batch.entropies, two.batch.entropies, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.advantages, two.advantages, rtol=1e-5, atol=1e-5)


def test_host_advantages_are_trls_own(tmp_path: Path) -> None:
    (first, *_) = records(tmp_path, "hapo")
    rewards = first.batch.rewards.view(-1, 4)
    # TRL: (r - mean) / (unbiased std + 1e-4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(first.batch.host_advantages, expected.view(-1))
    mask = first.batch.response_mask
    plain = assign_credit("grpo", first.batch)
    torch.testing.assert_close(plain, torch.where(mask, expected.view(-1, 1), 0.0))


def test_micro_batches_keep_whole_groups_at_rollout(tmp_path: Path) -> None:
    whole = records(tmp_path / "a", "hapo", "rollout", max_steps=1)
    cut = records(
        tmp_path / "b",
        "hapo",
        "auto",
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    (one,), (two,) = whole, cut
    assert torch.equal(one.batch.response_ids, two.batch.response_ids)
    assert two.batch.group_ids.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(one.advantages, two.advantages, rtol=1e-5, atol=1e-5)


def test_the_samplers_entropies_serve_without_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    @functools.wraps(original)
    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "fast", top_k=0),
        credit="hapo",
        timing="rollout",
        rollout_func=rollout_func,
        records=tmp_path / "records",
    )
    built.train()
    assert calls == [True] * 3  # the three forwards of the loss and no other
    record = RecordStore(tmp_path / "records").read(0)
    torch.testing.assert_close(assign_credit("hapo", record.batch), record.advantages, rtol=0, atol=0)


def test_unscored_responses_move_neither_baseline_nor_policy(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        scores = reward(completions)
        return [None if index == 1 else score for index, score in enumerate(scores)]

    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "out", max_steps=1),
        credit="dr_grpo",
        records=tmp_path / "records",
        reward_funcs=sometimes,
    )
    built.train()
    record = RecordStore(tmp_path / "records").read(0)
    scored = record.batch.rewards[[0, 2, 3]]
    assert record.batch.rewards[1] == pytest.approx(float(scored.mean()))
    assert record.advantages[1].abs().max() < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * (len(completions) - 1) + [value]

    with pytest.raises(TokenCreditError, match=r"reward function 'broken' gave (nan|inf) for row 7"):
        train(CreditGRPOTrainer, config(tmp_path), credit="hapo", reward_funcs=broken)


@pytest.mark.parametrize("loss_type", trl_checks.ERASED_BY_SEQUENCE_RATIO)
def test_sequence_ratios_are_refused(tmp_path: Path, loss_type: str) -> None:
    sequence = config(tmp_path, loss_type=loss_type, importance_sampling_level="sequence")
    with pytest.raises(TokenCreditError, match="erases token credit"):
        trainer(CreditGRPOTrainer, sequence, credit="hapo")


def test_a_sequence_ratio_does_erase_token_credit(tmp_path: Path) -> None:
    """If this fails, TRL has changed and the refusal above can go."""

    class Twisted(GRPOTrainer):
        twist = 0.0

        def _compute_loss(self, model, inputs):
            wide = inputs["advantages"][:, None].expand(inputs["completion_ids"].shape).clone()
            half = inputs["completion_mask"].sum(1) // 2
            wide[:, 0] += self.twist  # moved within the row: its sum over the mask stays
            wide[torch.arange(len(wide)), half] -= self.twist
            return super()._compute_loss(model, {**inputs, "advantages": wide})

    def norms(twist: float) -> list[float]:
        Twisted.twist = twist
        sequence = config(tmp_path / str(twist), importance_sampling_level="sequence", loss_type="grpo", max_steps=1)
        built = trainer(Twisted, sequence)
        built.train()
        return [log["grad_norm"] for log in built.state.log_history if "grad_norm" in log]

    assert norms(0.0) == pytest.approx(norms(3.0), rel=1e-4)


def test_update_timing_refuses_to_cut_groups(tmp_path: Path) -> None:
    split = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(TokenCreditError, match="steps_per_generation=1"):
        trainer(CreditGRPOTrainer, split, credit="hapo", timing="update")
    assert trainer(CreditGRPOTrainer, split, credit="entropy_advantage", timing="update").timing == "update"


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="unknown timing 'later'"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="hapo", timing="later")
    with pytest.raises(TokenCreditError, match="needs `ref_logprobs`"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="policy_divergence")
    with pytest.raises(TokenCreditError, match="needs the policy that is being updated"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="fipo", timing="rollout")
    with pytest.raises(TokenCreditError, match="did you mean 'hapo'"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="hapoo")
    with pytest.raises(TokenCreditError, match="one advantage a response"):
        trl_checks.check_config(get_pipeline("hapo"), config(tmp_path, use_liger_kernel=True))
    with pytest.warns(UserWarning, match="masks tokens a second time"):
        trl_checks.check_config(get_pipeline("hapo"), config(tmp_path, top_entropy_quantile=0.2))


@pytest.mark.parametrize("installed", ["0.29.1", "1.4.9", "2.0.0"])
def test_versions_out_of_range(installed: str) -> None:
    with pytest.raises(TokenCreditError, match="outside the supported range"):
        trl_checks.check_versions(installed)


def test_reference_log_probs_come_from_the_hosts_kl_pass(tmp_path: Path) -> None:
    arguments = config(tmp_path / "out", max_steps=1, beta=0.01)
    stored = saved_model(tmp_path / "model")  # TRL loads the reference from the policy's folder
    settings = {"credit": "policy_divergence", "records": tmp_path / "records"}
    trainer(CreditGRPOTrainer, arguments, model=stored, **settings).train()
    first = RecordStore(tmp_path / "records").read(0)
    # At the first step policy and reference are the same: no divergence, uniform credit.
    plain = torch.where(first.batch.response_mask, first.batch.host_advantages[:, None], 0.0)
    torch.testing.assert_close(first.advantages, plain, rtol=1e-4, atol=1e-4)
