from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tokencredit.errors import TokenCreditError
from tokencredit.lab.rollout import rollout_func, rollout_seed

VOCAB = ["<pad>", "<eos>", *"0123456789+="]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCAB)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", model_input_names=["input_ids", "attention_mask"]
    )


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCAB),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )


def many_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(character in "01234" for character in text) / 10 for text in completions]


class Watched(GRPOTrainer):
    """Keeps the last generation batch, before it is shuffled, and the entropies found in its rows."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.scored = super()._generate_and_score_completions(inputs)
        self.row_entropies = [row["entropies"] for row in inputs]
        return self.scored


def make_trainer(folder: Path, rollout: Callable[..., Any] = rollout_func, **changes: Any) -> Watched:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "temperature": 0.9,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes
    # One epoch only: TRL starts the order of the first epoch again when a run resumes in a later one.
    prompts = [f"{left}+{right}=" for left in (1, 12, 444, 5) for right in (0, 3, 10, 99)]
    return Watched(
        model=make_model(),
        reward_funcs=many_digits,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=make_tokenizer(),
        rollout_func=rollout,
    )


def weights(trainer: GRPOTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_killed_and_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(
        tmp_path / "part", max_steps=2, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
    ).train()
    steady = make_trainer(tmp_path / "steady", lr_scheduler_type="constant")
    steady.train()
    resumed = make_trainer(tmp_path / "part", lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert_equal(weights(resumed), weights(steady))
    with pytest.raises(AssertionError):  # the comparison can fail: another schedule ends elsewhere
        assert_equal(weights(whole), weights(steady))


def test_returned_logprobs_do_not_change_training(tmp_path: Path) -> None:
    def without(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        return rollout_func(prompts, trainer) | {"logprobs": None}

    def shifted(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        return output | {"logprobs": [[value - 1 for value in row] for row in output["logprobs"]]}

    ends = []
    for number, rollout in enumerate((rollout_func, without, shifted)):
        trainer = make_trainer(tmp_path / str(number), rollout, max_steps=2)
        trainer.train()
        assert "importance_sampling_ratio" not in trainer.scored
        assert "old_per_token_logps" not in trainer.scored
        ends.append(weights(trainer))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def test_entropies_and_logprobs_are_those_of_the_training_forward(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    batch, rows = trainer.scored, trainer.row_entropies
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
        )
    chosen = batch["completion_mask"].bool()
    assert batch["prompt_mask"].min() == 0  # prompts of different lengths
    assert [len(row) for row in rows] == chosen.sum(1).tolist()
    torch.testing.assert_close(
        torch.tensor([value for row in rows for value in row]), entropies[chosen], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(batch["sampling_per_token_logps"][chosen], logprobs[chosen], rtol=0, atol=1e-5)


def test_each_generation_batch_of_a_step_has_its_own_stream(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    seeds = []

    def spy(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        seeds.append((trainer.state.global_step, rollout_seed(prompts, trainer)))
        return rollout_func(prompts, trainer)

    trainer.rollout_func = spy
    trainer.train()
    assert [step for step, _ in seeds] == [0, 0, 1, 1, 2, 2, 3, 3]
    trainer.model.eval()
    evaluation = [rollout_seed([prompt], trainer) for prompt in ("1+1=", "7=")]
    assert len({seed for _, seed in seeds} | set(evaluation)) == 10


def test_equal_prompts_that_are_neighbours_make_one_group_in_order(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    output = rollout_func(["1+1=", "1+1=", "7=", "1+1="], trainer)
    two, seven = [3, 12, 3, 13], [9, 13]  # "1+1=" and "7=" in VOCAB
    assert output["prompt_ids"] == [two, two, seven, two]
    assert [len(row) for row in output["completion_ids"]] == [len(row) for row in output["entropies"]]


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.1}])
def test_sampling_options_it_lacks_are_refused(tmp_path: Path, option: dict[str, float]) -> None:
    trainer = make_trainer(tmp_path, **option)
    with pytest.raises(TokenCreditError, match=next(iter(option))):
        rollout_func(["7="], trainer)
