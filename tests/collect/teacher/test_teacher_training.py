"""Teachers inside TRL's trainer: distillation moves the student to its teacher, in every arrangement that we offer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.collect.teacher import collect as teacher_collector
from tokencredit.collect.teacher.build import build_teacher
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.rollout import rollout_func

ALPHABET = "0123456789+="
TOKENIZER = build_tokenizer(ALPHABET)
DATA = Dataset.from_dict({"prompt": [f"{a}+{a + 1}=" for a in range(8)], "answer": [str(2 * a + 1) for a in range(8)]})


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL calls its rollout functions experimental."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def no_reward(completions: list[str], **_: Any) -> list[float]:
    """Pure distillation: the reward is there to be logged."""
    return [0.0] * len(completions)


def odd(completions: list[str], **_: Any) -> list[float]:
    return [float(text[-1:] in tuple("13579")) for text in completions]


def train(folder: Path, credit: str, teacher: Any, *, reward: Any = odd, steps: int = 2, **extra: Any) -> Any:
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_generations=2,
        max_completion_length=6,
        learning_rate=5e-3,
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
    )
    trainer = CreditGRPOTrainer(
        model=build_model(TOKENIZER, layers=1, width=32, heads=2, seed=1),
        args=arguments,
        reward_funcs=reward,
        train_dataset=DATA,
        processing_class=TOKENIZER,
        rollout_func=rollout_func,
        credit=credit,
        teacher=teacher,
        **extra,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher with opinions: another initialisation, its logits three times as large."""
    path = tmp_path_factory.mktemp("opinionated")
    model = build_model(TOKENIZER, layers=1, width=32, heads=2, seed=2)
    with torch.no_grad():
        model.get_decoder().norm.weight.mul_(3.0)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def divergence(student: Any, teacher: Any) -> float:
    """KL(student‖teacher) of the first response token, mean over the prompts."""
    ids = torch.tensor(TOKENIZER(list(DATA["prompt"]))["input_ids"])
    with torch.no_grad():
        own, other = (model(input_ids=ids).logits[:, -1].log_softmax(-1) for model in (student, teacher))
    return float((own.exp() * (own - other)).sum(-1).mean())


@pytest.mark.parametrize("credit", ["opd", "iw_opd"])
def test_distillation_without_reward_moves_the_student_to_the_teacher(tmp_path: Path, folder: str, credit: str) -> None:
    teacher = build_teacher({"kind": "model", "model": folder})
    before = divergence(build_model(TOKENIZER, layers=1, width=32, heads=2, seed=1), teacher.model)
    trained = train(tmp_path, credit, teacher, reward=no_reward, steps=25)
    after = divergence(trained.model.eval(), teacher.model)
    assert after < 0.5 * before
    assert [log["reward"] for log in trained.state.log_history if "reward" in log] == [0.0] * 25


@pytest.mark.parametrize("credit", ["dasd", "rlsd", "srpo", "grpo_sd", "dasd_permuted", "0.5 * dasd + 0.5 * opsd"])
def test_self_distillation_trains(tmp_path: Path, credit: str) -> None:
    teacher = {"kind": "self", "template": "{answer}={prompt}"}
    trained = train(tmp_path, credit, teacher)
    assert trained.state.global_step == 2
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trained.model.parameters())


def test_a_sibling_is_taken_from_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    find_attempts = teacher_collector.attempts

    def attempts(rollout: Any) -> list[str | None]:
        found = find_attempts(rollout)
        seen.extend(found)
        return found

    monkeypatch.setattr(teacher_collector, "attempts", attempts)
    train(tmp_path, "rlrt", build_teacher({"kind": "self", "template": "{attempt}={prompt}"}))
    assert len(seen) == 2 * 16
    assert any(text is not None for text in seen)


def test_log_probs_and_entropies_come_from_one_pass(tmp_path: Path, folder: str) -> None:
    teacher = build_teacher({"kind": "model", "model": folder})
    calls: list[int] = []
    score = teacher.score_with_entropies
    teacher.score_with_entropies = lambda *given, **more: calls.append(1) or score(*given, **more)
    train(tmp_path, ["group_normalized", "srpo", {"antisd": {"h_warm": 0.1}}], teacher, steps=2)
    assert len(calls) == 2 + 1  # the first batch is scored again in part, to see whether the teacher repeats itself


def test_a_lora_student_has_its_base_as_teacher_at_no_memory(tmp_path: Path) -> None:
    teacher = build_teacher({"kind": "base", "template": "{answer}={prompt}"})
    trained = train(tmp_path, "opsd", teacher, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert trained.state.global_step == 2
    assert teacher.state() == {}
    assert any(bool(p.any()) for name, p in trained.model.named_parameters() if "lora_B" in name)


def test_what_cannot_be_scored_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="row 0 has no `solution`"):
        train(tmp_path, "dasd", {"kind": "self", "template": "{solution}={prompt}"})
    with pytest.raises(TokenCreditError, match="has no adapter"):
        train(tmp_path, "opd", {"kind": "base"})
