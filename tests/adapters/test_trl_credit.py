"""The advantages that TRL trains on are the pure function of what TRL measured."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl import GRPOTrainer
from trl_setup import ALPHABET, config, saved_model, trainer

from tokencredit import TokenCreditError, assign_credit, get_pipeline
from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.rollout import rollout_func


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


@pytest.mark.parametrize("credit", ["grpo", "dr_grpo", "rloo", "psr", "nsr", "w_reinforce", "success_trie", "hapo"])
def test_unscored_responses_move_neither_baseline_nor_policy(credit: str, tmp_path: Path) -> None:
    """Group 0 scores None, 1, 0, 1; group 1 scores nothing at all."""

    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        return [None, 1.0, 0.0, 1.0, *[None] * 4][: len(completions)]

    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "out", max_steps=1),
        credit=credit,
        records=tmp_path / "records",
        reward_funcs=sometimes,
    )
    built.train()
    record = RecordStore(tmp_path / "records").read(0)
    assert record.batch.scored.tolist() == [False, True, True, True, *[False] * 4]
    assert record.batch.step == 0
    assert record.advantages[[0, 4, 5, 6, 7]].abs().max() == 0
    # The mean of the three that count is 2/3; leave-one-out baselines are 1/2, 1 and 1/2.
    by_hand = {"dr_grpo": [1 / 3, -2 / 3, 1 / 3], "rloo": [0.5, -1.0, 0.5], "psr": [1.0, 0.0, 1.0]}
    if credit in by_hand:
        assert record.advantages[1:4, 0].tolist() == pytest.approx(by_hand[credit], abs=1e-6)


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
    cut = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(TokenCreditError, match="steps_per_generation=1"):
        trainer(CreditGRPOTrainer, cut, credit="hapo", timing="update")
    assert trainer(CreditGRPOTrainer, cut, credit="hapo").timing == "rollout"
    assert trainer(CreditGRPOTrainer, cut, credit="entropy_advantage", timing="update").timing == "update"
    whole = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(TokenCreditError, match="which looks at the whole batch"):
        trainer(CreditGRPOTrainer, whole, credit="forking_tokens", timing="update")


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="unknown timing 'later'"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="hapo", timing="later")
    with pytest.raises(TokenCreditError, match="needs `ref_logprobs`"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="policy_divergence")
    with pytest.raises(TokenCreditError, match="needs the policy that is being updated"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="fipo", timing="rollout")
    with pytest.raises(TokenCreditError, match="did you mean 'hapo'"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="hapoo")
    trl_checks.check_config(get_pipeline("hapo"), config(tmp_path, use_liger_kernel=True))  # layer kernels alone
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


def test_ligers_own_loss_of_older_versions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda *_: None, raising=False)
    with pytest.raises(TokenCreditError, match="one advantage per response"):
        trl_checks.check_config(get_pipeline("hapo"), config(tmp_path, use_liger_kernel=True))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"teacher": 1}, "`teacher` must be a mapping with `kind`"),
        ({"teacher": []}, "`teacher` must be a mapping with `kind`"),
        ({"timing": 3}, "unknown timing '3'"),
        ({"teacher": {"kind": "modell"}}, "did you mean 'model'"),
        ({"collectors": ["entropies"]}, "`collectors` must be a mapping"),
        ({"collectors": {"entropies": 3}}, "must be a function"),
        ({"records": 7}, "`records` must be a folder"),
        ({"record_every": 0}, "`record_every` must be a whole number"),
    ],
)
def test_bad_arguments_are_one_line(extra: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match=message) as caught:
        trainer(CreditGRPOTrainer, config(tmp_path), credit="grpo", **extra)
    assert "\n" not in caught.value.message


def test_a_log_prob_that_vllm_could_not_give_stops_no_method_that_does_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(text=prompts)["input_ids"]
        return {
            "prompt_ids": ids,
            "completion_ids": [[2, 3, 4 + row % 3] for row in range(len(ids))],
            "logprobs": [[-2.0, float("nan"), -2.0] for _ in ids],
        }

    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "out", max_steps=1),
        credit="hapo",
        records=tmp_path / "records",
        rollout_func=rollouts,
        reward_funcs=lambda completions, **_: [float(row % 2) for row in range(len(completions))],
    )
    built.train()
    record = RecordStore(tmp_path / "records").read(0)
    assert bool(record.batch.rollout_logprobs[:, 1].isnan().all())
    torch.testing.assert_close(assign_credit("hapo", record.batch), record.advantages, rtol=0, atol=0)


def test_records_show_prompts_and_responses_as_the_model_sees_them(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["<eos>1+2=", "34+56="] * 4})
    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "out", max_steps=1),
        credit="hapo",
        records=tmp_path / "records",
        train_dataset=rows,
    )
    built.train()
    record = RecordStore(tmp_path / "records").read(0)
    assert set(record.prompts) == {"<eos>1+2=", "34+56="}  # the special token is there, the padding is not
    for ids, pieces in zip(record.batch.response_ids.tolist(), record.tokens, strict=True):
        assert "".join(pieces) == built.processing_class.decode(ids)


def test_a_teacher_reads_the_beginning_of_a_stream(tmp_path: Path) -> None:
    read = []

    def endless() -> Any:
        for row in range(10**9):
            read.append(row)
            yield {"prompt": f"{row % 10}+1=", "answer": str(row % 10 + 1)}

    stream = IterableDataset.from_generator(endless)
    teacher = {"kind": "self", "template": "{answer}:{prompt}"}
    tokenizer = build_tokenizer(ALPHABET + ":")
    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path, max_steps=1),
        credit="dasd",
        teacher=teacher,
        train_dataset=stream,
        processing_class=tokenizer,
        model=build_model(tokenizer, layers=1, width=16, heads=2, seed=1),
    )
    assert len(read) < 1000
    built.train()


def test_an_adapter_of_transformers_own_is_refused_by_name(tmp_path: Path) -> None:
    model = build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert not trl_checks.has_adapter((model,), {})
    with pytest.raises(TokenCreditError, match="add_adapter"):
        trainer(CreditGRPOTrainer, config(tmp_path), credit="arca", model=model)


def test_compiled_models_are_not_tapped(tmp_path: Path) -> None:
    built = trainer(CreditGRPOTrainer, config(tmp_path, torch_compile=True), credit="attention")
    assert built._taps.fields == set()
    assert trainer(CreditGRPOTrainer, config(tmp_path), credit="attention")._taps.fields == {"attention_entropies"}
