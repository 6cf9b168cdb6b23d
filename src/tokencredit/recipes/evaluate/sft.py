"""The built-in evaluator: TRL's SFTTrainer on a small causal model, then the problems of a split."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field

from tokencredit.adapters.trl.checks import checkpointing_field
from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.problems import read_problems, refuse_overlap
from tokencredit.recipes.evaluate.records import EvaluationFailed, Evaluator, Metrics, Request, key_of, run_once
from tokencredit.recipes.evaluate.scores import accuracies, generate, likelihoods, metrics_of
from tokencredit.recipes.pool.encode import Conversations, encode_all
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.signals.load import folder_revision, load_model
from tokencredit.settings import Count, Settings, Text, Words


def _check_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise TokenCreditError(f"`answer` of evaluator 'sft' is not a regular expression: {error}") from error
    if groups < 1:
        raise TokenCreditError(f"`answer` of evaluator 'sft' needs a group, got {pattern!r}")
    return pattern


class SftSettings(Settings):
    """`evaluator:` of a search file with `kind: sft`: everything that moves a number.

    `splits` are files of {task, prompt, answer, id}. `steps` fixes the training length whatever the size of the subset,
    so that size and length are not confounded.
    """

    section: ClassVar[str] = "evaluator"
    key_kind: ClassVar[str] = "key of evaluator 'sft'"

    model: Text
    splits: Mapping[str, str]
    steps: Count = 300
    batch_size: Count = 16
    learning_rate: Annotated[int | float, Field(gt=0), Words("a number above 0")] = 2e-3
    max_length: Count = 256
    max_new_tokens: Count = 64
    eval_batch: Count = 256
    answer: Annotated[str, AfterValidator(_check_pattern)] = r"(\S+)\s*$"  # the last word of a response
    metric: Literal["accuracy", "likelihood"] = "accuracy"
    skip_bad: bool = False  # train without the samples that the chat template refuses, instead of failing
    trainer: Mapping[str, Any] | None = None  # any further field of TRL's SFTConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SftEvaluator:
    """Fine-tunes in this process and scores the problems of the split."""

    pool: Pool
    settings: SftSettings
    key: str

    def __call__(self, request: Request) -> Metrics:
        return run_once(request, self._run)

    def _run(self, request: Request) -> Metrics:
        settings, conversations = self.settings, list(self.pool.samples(request.positions))
        model, tokenizer, train = fine_tune(settings, conversations, request.seed, request.folder)
        problems = read_problems(settings.splits, request.split)
        if settings.metric == "likelihood":
            scores = likelihoods(model, tokenizer, problems, settings.max_length)
        else:
            responses = generate(settings, model, tokenizer, [problem["prompt"] for problem in problems])
            scores = accuracies(responses, problems, settings.answer)
        return metrics_of(problems, scores, train)


def make_sft_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """Make the evaluator of an `evaluator` block; the key covers settings, model weights and the problems."""
    settings = SftSettings.read(config)
    problems = {split: read_problems(settings.splits, split) for split in settings.splits}
    refuse_overlap(problems)
    revision = folder_revision(Path(settings.model)) if Path(settings.model).is_dir() else settings.model
    # Version 2: masks from the whole rendering, every end token of the model. `skip_bad` moves a number only where set.
    left_out = {"splits"} if settings.skip_bad else {"splits", "skip_bad"}
    numbers = {name: value for name, value in settings.to_mapping().items() if name not in left_out}
    return SftEvaluator(pool=pool, settings=settings, key=key_of("sft", 2, numbers, revision, problems))


def fine_tune(
    settings: SftSettings, conversations: Conversations, seed: int, folder: Path
) -> tuple[Any, Any, dict[str, float]]:
    """Return the fine-tuned model, its tokenizer and what the training took. Loss on responses only."""
    import datasets
    import torch
    from trl import SFTTrainer

    model, tokenizer = load_model(settings.model, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = encode_all(tokenizer, conversations, settings.max_length, [] if settings.skip_bad else None)
    answered = [e for e in encoded if e.mask.any()]
    if not answered:
        raise EvaluationFailed(f"no response lies within {settings.max_length} tokens")
    # The set is what counts: a canonical order, so that the order of a recipe does not move the numbers.
    answered.sort(key=lambda e: e.ids)
    examples = [{"input_ids": e.ids, "completion_mask": e.mask.astype(int).tolist()} for e in answered]
    datasets.disable_progress_bars()  # four bars a run would drown the search's own
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, seed, folder),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    output = trainer.train()
    loss = float(output.training_loss)
    if not np.isfinite(loss):
        raise EvaluationFailed(f"the training loss is {loss}")
    facts = {"steps": float(output.global_step), "loss": loss, "samples": float(len(examples))}
    return trainer.model.eval(), tokenizer, facts


def _arguments(settings: SftSettings, seed: int, folder: Path) -> Any:
    from trl import SFTConfig

    arguments = {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.steps // 20),
        "max_length": settings.max_length,
        "completion_only_loss": True,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        checkpointing_field(SFTConfig): False,  # TRL's default is on, which costs a third on a tiny model
        "dataloader_pin_memory": False,
        **(settings.trainer or {}),
    }
    try:
        return SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TokenCreditError(
            f"`trainer` of evaluator 'sft': {reason}", hint="its keys are fields of SFTConfig"
        ) from error
