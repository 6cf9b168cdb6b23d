"""The trainer and the evaluation on a real GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl_setup import config, outcome, trainer

from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import get_task

ON_GPU: dict[str, Any] = {"use_cpu": False, "max_steps": 2}


@pytest.mark.parametrize("bf16", [False, True])
def test_an_identity_pipeline_is_bit_identical(bf16: bool, tmp_path: Path) -> None:
    results = []
    for kind, extra in ((GRPOTrainer, {}), (CreditGRPOTrainer, {"credit": "grpo"})):
        torch.manual_seed(0)
        built = trainer(kind, config(tmp_path / kind.__name__, bf16=bf16, **ON_GPU), **extra)
        built.train()
        built.model.cpu()
        results.append(outcome(built))
    assert results[0] == results[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_timings_give_one_credit(accumulation: int, tmp_path: Path) -> None:
    found = []
    for timing in ("update", "rollout"):
        folder = tmp_path / timing
        settings = config(
            folder / "out",
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            **ON_GPU,
        )
        trainer(CreditGRPOTrainer, settings, credit="hapo", timing=timing, records=folder / "records").train()
        found.append(RecordStore(folder / "records").read(0))
    assert torch.equal(found[0].batch.response_ids, found[1].batch.response_ids)
    torch.testing.assert_close(found[0].advantages, found[1].advantages, rtol=1e-4, atol=1e-4)


def test_a_frozen_copy_is_the_policy_under_bf16(tmp_path: Path) -> None:
    teacher = {"kind": "self", "weights": "frozen"}
    built = trainer(
        CreditGRPOTrainer,
        config(tmp_path / "out", bf16=True, **ON_GPU),
        credit="opd",
        teacher=teacher,
        records=tmp_path / "records",
    )
    built.train()
    batch = RecordStore(tmp_path / "records").read(0).batch
    gap = (batch.teacher_logprobs - batch.old_logprobs)[batch.response_mask]
    assert float(gap.abs().max()) == 0.0


def test_success_of_a_model_on_the_gpu_leaves_random_state_alone() -> None:
    task = get_task("countdown")
    problems = task.problems("test", 2)
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer, layers=2, width=32, heads=2, seed=1)
    expected = success_probability(model, tokenizer, task, problems)
    model.cuda()
    state = torch.cuda.get_rng_state()
    torch.testing.assert_close(success_probability(model, tokenizer, task, problems), expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(torch.cuda.get_rng_state(), state)
