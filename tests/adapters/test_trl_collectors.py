"""Methods that need more than the host's own passes, trained for real on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl_setup import ALPHABET, config, saved_model, trainer

from tokencredit import TokenCreditError, assign_credit
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.teacher.collect import attempts
from tokencredit.lab.model import build_tokenizer

LORA = LoraConfig(r=2, target_modules="all-linear")


def run(folder: Path, credit: Any, **extra: Any) -> tuple[Any, list]:
    settings = {"max_steps": 2} | extra.pop("settings", {})
    records = folder / "records"
    built = trainer(CreditGRPOTrainer, config(folder / "out", **settings), credit=credit, records=records, **extra)
    built.train()
    return built, list(RecordStore(records))


@pytest.mark.parametrize("timing", ["update", "rollout"])
def test_arca_trains_with_lora(tmp_path: Path, timing: str) -> None:
    _, (first, second) = run(tmp_path, "arca", peft_config=LORA, timing=timing)
    # B = 0 at the start: no residual, uniform credit; after a step the adapter has moved the hidden states.
    assert first.batch.adapter_residuals.abs().max() == 0
    uniform = torch.where(first.batch.response_mask, first.batch.host_advantages[:, None], 0.0)
    torch.testing.assert_close(first.advantages, uniform)
    assert second.batch.adapter_residuals.abs().max() > 0
    torch.testing.assert_close(assign_credit("arca", second.batch), second.advantages, rtol=0, atol=0)


def test_arca_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="LoRA"):
        run(tmp_path, "arca")


def test_attention_entropies_train(tmp_path: Path) -> None:
    _, (first, _) = run(tmp_path, "attention")
    chosen = first.batch.attention_entropies[first.batch.response_mask]
    assert 0 < float(chosen.min()) <= float(chosen.max()) <= 1


def test_a_teacher_is_asked_once_for_a_mixture(tmp_path: Path) -> None:
    teacher = {"kind": "model", "model": saved_model(tmp_path / "teacher")}
    built, (first, second) = run(tmp_path, "0.5 * grpo + 0.5 * iw_opd", teacher=teacher)
    # The teacher has the student's starting weights: no gap at the first step, some at the second.
    gap = first.batch.teacher_logprobs - first.batch.old_logprobs
    assert gap[first.batch.response_mask].abs().max() < 1e-4
    gap = second.batch.teacher_logprobs - second.batch.old_logprobs
    assert gap[second.batch.response_mask].abs().max() > 1e-4
    torch.testing.assert_close(assign_credit(built.pipeline, second.batch), second.advantages, rtol=0, atol=0)


def test_a_pipeline_without_a_teacher_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="needs `teacher_logprobs`"):
        run(tmp_path, "opd")


def test_an_averaged_teacher_resumes(tmp_path: Path) -> None:
    teacher = {"kind": "self", "weights": "ema", "ema_rate": 0.5}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, records = run(tmp_path / "whole", "opd", teacher=teacher, settings=settings)
    again = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "again", **settings),
        credit="opd",
        teacher=teacher,
        records=tmp_path / "again-records",
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    resumed = list(RecordStore(tmp_path / "again-records"))
    assert [record.step for record in resumed] == [2, 3]
    assert torch.equal(resumed[0].batch.teacher_logprobs, records[2].batch.teacher_logprobs)
    states = whole.teacher.state(), again.teacher.state()
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_own_collectors_fill_fields(tmp_path: Path) -> None:
    seen = []

    def lengths(rollout: Rollout) -> torch.Tensor:
        seen.append(rollout)
        return rollout.response_mask.float().cumsum(1)

    run(tmp_path, ["group_normalized", "outcome_importance"], collectors={"importances": lengths})
    assert len(seen) == 2
    assert len(seen[0].columns) == len(seen[0].response_ids) == 8


def test_attempts_are_better_siblings() -> None:
    tokenizer = build_tokenizer(ALPHABET)
    ids = torch.tensor(tokenizer(["1", "2", "3", "4"])["input_ids"])
    rollout = Rollout(
        model=None,
        tokenizer=tokenizer,
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        response_ids=ids,
        response_mask=torch.ones_like(ids, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.5]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        columns=[{}] * 4,
        temperature=1.0,
    )
    # Group 0: the second response sees the first; the first has no better sibling. Group 1: all equal, none.
    assert attempts(rollout) == [None, "1", None, None]
