"""The built-in evaluator: TRL's SFTTrainer on a small causal model, then greedy accuracy on verifiable problems."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.adapters.trl.checks import checkpointing_field
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import make_folder, write_json
from tokencredit.progress import printable
from tokencredit.recipes.evaluate.evaluators import RESULT, _finished, _items_json, key_of
from tokencredit.recipes.pool.readers import records
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.search.objective import (
    EvaluationFailed,
    Evaluator,
    Metrics,
    Request,
    TaskScore,
    metrics_to_json,
)
from tokencredit.seeds import derive

ANSWER = r"(\S+)\s*$"  # the last word of a response


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """Everything that moves a number. `splits` are files of {task, prompt, answer, id}; `steps` fixes the training
    length whatever the size of the subset, so that size and length are not confounded."""

    model: str
    splits: Mapping[str, str]
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    max_length: int = 256
    max_new_tokens: int = 64
    eval_batch: int = 256
    answer: str = ANSWER
    metric: str = "accuracy"  # or likelihood: mean probability of a token of the reference, e^{mean log p}
    skip_bad: bool = False  # train without the samples that the chat template refuses, instead of failing
    trainer: Mapping[str, Any] | None = None  # any further field of TRL's SFTConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SftEvaluator:
    """Fine-tunes in this process; a finished run is read from its folder."""

    pool: Pool
    settings: SftSettings
    key: str

    def __call__(self, request: Request) -> Metrics:
        result = request.folder / RESULT
        if result.is_file():
            return _finished(result)
        make_folder(request.folder)
        conversations = list(self.pool.samples(request.positions))
        model, tokenizer, train = fine_tune(self.settings, conversations, request.seed, request.folder)
        metrics = evaluate_model(self.settings, model, tokenizer, request.split)
        metrics = Metrics(tasks=metrics.tasks, items=metrics.items, train=train)
        write_json(result, {"metrics": metrics_to_json(metrics), "items": _items_json(metrics)})
        return metrics


def make_sft_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """From the `evaluator` block; the key covers settings, model weights and the problems."""
    from tokencredit.recipes.signals.forward import folder_revision

    known = [entry.name for entry in fields(SftSettings)]
    given = {name: value for name, value in config.items() if name != "kind"}
    for name in given:
        if name not in known:
            raise unknown("key of evaluator 'sft'", name, known)
    for name in ("model", "splits"):
        if not given.get(name):
            raise TokenCreditError(f"evaluator 'sft' needs `{name}`")
    _check_types(given)
    settings = SftSettings(**given)
    if settings.metric not in {"accuracy", "likelihood"}:
        raise unknown("metric of evaluator 'sft'", settings.metric, ("accuracy", "likelihood"))
    problems = {split: read_problems(Path(path)) for split, path in settings.splits.items()}
    _refuse_overlap(problems)
    revision = folder_revision(Path(settings.model)) if Path(settings.model).is_dir() else settings.model
    # Version 2: masks from the whole rendering, every end token of the model. `skip_bad` moves a number only where set.
    left_out = {"splits"} if settings.skip_bad else {"splits", "skip_bad"}
    numbers = {name: getattr(settings, name) for name in known if name not in left_out}
    key = key_of("sft", 2, numbers, revision, problems)
    return SftEvaluator(pool=pool, settings=settings, key=key)


def _check_types(given: Mapping[str, Any]) -> None:
    """Refuse a setting of another type than its default's."""
    for entry in fields(SftSettings):
        value, default = given.get(entry.name), entry.default
        if entry.name not in given or (value is None and default is None):
            continue
        if isinstance(default, float):
            right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        elif isinstance(default, int) and not isinstance(default, bool):
            right = type(value) is int and value > 0
        elif entry.name in {"splits", "trainer"}:
            right = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        else:
            right = isinstance(value, bool) if isinstance(default, bool) else isinstance(value, str)
        if not right:
            raise TokenCreditError(
                f"`{entry.name}` of evaluator 'sft' cannot be {value!r}",
                hint="see `SftSettings` in docs/recipes.md" if default is None else f"its default is {default!r}",
            )
    try:
        if re.compile(str(given.get("answer", ANSWER))).groups < 1:
            raise TokenCreditError(f"`answer` of evaluator 'sft' needs a group, got {given['answer']!r}")
    except re.error as error:
        raise TokenCreditError(f"`answer` of evaluator 'sft' is not a regular expression: {error}") from error


def read_problems(path: Path) -> list[dict[str, str]]:
    """The problems of a split; a line that is not `{task, prompt, answer}` is an error with file and number."""
    problems = []
    if not path.is_file():
        raise TokenCreditError(f"{path} does not exist", hint="give a JSONL file of {task, prompt, answer}")
    for number, record in records(path):
        missing = [name for name in ("task", "prompt", "answer") if not isinstance(record, dict) or name not in record]
        if missing:
            raise TokenCreditError(f"{path}:{number}: expected {{task, prompt, answer}}, {missing[0]!r} is missing")
        problem = {name: str(record[name]) for name in ("task", "prompt", "answer")}
        problems.append(problem | {"id": str(record.get("id", number)), "reference": str(record.get("reference", ""))})
    if not problems:
        raise TokenCreditError(f"{path} holds no problem")
    return problems


def _refuse_overlap(problems: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    owner: dict[tuple[str, str], str] = {}
    for split, items in problems.items():
        for item in items:
            other = owner.setdefault((item["task"], item["prompt"]), split)
            if other != split:
                raise TokenCreditError(
                    f"splits {other!r} and {split!r} share the problem {item['prompt'][:60]!r}",
                    hint="search and confirmation need disjoint problems",
                )


def fine_tune(
    settings: SftSettings,
    conversations: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    seed: int,
    folder: Path,
) -> tuple[Any, Any, dict[str, float]]:
    """The fine-tuned model, its tokenizer and what the training took. Loss on responses only."""
    import datasets
    from trl import SFTTrainer

    from tokencredit.recipes.pool.encode import encode_all

    model, tokenizer = _load(settings.model)
    encoded = encode_all(tokenizer, conversations, settings.max_length, [] if settings.skip_bad else None)
    rows = [{"input_ids": e.ids, "completion_mask": e.mask.astype(int).tolist()} for e in encoded if e.mask.any()]
    if not rows:
        raise EvaluationFailed(f"no response lies within {settings.max_length} tokens")
    # The set is what counts: a canonical order, so that the order of a recipe does not move the numbers.
    rows.sort(key=lambda row: row["input_ids"])
    datasets.disable_progress_bars()  # four bars a run would drown the search's own
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, seed, folder),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    output = trainer.train()
    loss = float(output.training_loss)
    if not np.isfinite(loss):
        raise EvaluationFailed(f"the training loss is {loss}")
    return (
        trainer.model.eval(),
        tokenizer,
        {"steps": float(output.global_step), "loss": loss, "samples": float(len(rows))},
    )


def _load(name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # "Loading weights" would fill a log with half-drawn bars
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(f"cannot load model {name!r}: {printable(lines[0])}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


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


def evaluate_model(settings: SftSettings, model: Any, tokenizer: Any, split: str) -> Metrics:
    """Scores of a split, item by item."""
    if split not in settings.splits:
        raise unknown("split", split, settings.splits)
    problems = read_problems(Path(settings.splits[split]))
    if settings.metric == "likelihood":
        scores, failures = _likelihoods(settings, model, tokenizer, problems), [False] * len(problems)
    else:
        responses = generate(settings, model, tokenizer, [problem["prompt"] for problem in problems])
        found = [re.search(settings.answer, response) for response in responses]
        failures = [match is None for match in found]
        scores = [
            float(match is not None and match[1].strip() == problem["answer"].strip())
            for match, problem in zip(found, problems, strict=True)
        ]
    tasks = {}
    for task in dict.fromkeys(problem["task"] for problem in problems):
        rows = [row for row, problem in enumerate(problems) if problem["task"] == task]
        mean = float(np.mean([scores[row] for row in rows]))
        tasks[task] = TaskScore(score=mean, n=len(rows), parse_fail=sum(failures[row] for row in rows))
    items = {(problem["task"], problem["id"]): score for problem, score in zip(problems, scores, strict=True)}
    return Metrics(tasks=tasks, items=items)


def generate(settings: SftSettings, model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy responses; the lab's sampler where it knows the model, Hugging Face's elsewhere.

    A response ends with any of the model's end tokens. Nothing of the model's generation config but those enters: no
    repetition penalty, no shortest length. The model trains or not afterwards as it did before.
    """
    from tokencredit.collect.models import eval_mode
    from tokencredit.lab.sampler import end_ids
    from tokencredit.recipes.pool.encode import encode_prompt

    ends = end_ids(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), settings.eval_batch):
        rows = order[start : start + settings.eval_batch]
        ids, mask = _left_pad([encode_prompt(tokenizer, prompts[row]) for row in rows], pad)
        device = next(model.parameters()).device  # the trainer has moved the model to its device
        with eval_mode(model):
            new_ids = _greedy(model, ids.to(device), mask.to(device), ends, pad, settings.max_new_tokens)
        for row, tokens in zip(rows, new_ids, strict=True):
            stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            texts[row] = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    return [texts[row] for row in range(len(prompts))]


def _greedy(model: Any, ids: Any, mask: Any, ends: list[int], pad: int, steps: int) -> list[list[int]]:
    """The most probable continuation of each row, with whatever follows its end token."""
    import torch
    from transformers import GenerationConfig

    from tokencredit.lab import sampler

    if sampler.unsupported(model) is None:
        new = sampler.sample(
            model,
            ids,
            mask,
            max_new_tokens=steps,
            eos_token_id=ends,
            generator=torch.Generator().manual_seed(derive("greedy")),
            temperature=0.0,
        )
        return [tokens[kept].tolist() for tokens, kept in zip(new.ids, new.mask, strict=True)]
    shipped = model.generation_config
    # `generate` fills what a call leaves open from the model's own config, so that one is set aside.
    model.generation_config = GenerationConfig(
        max_new_tokens=steps, do_sample=False, eos_token_id=ends, pad_token_id=pad
    )
    try:
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask.long())
    finally:
        model.generation_config = shipped
    return [list(row) for row in out[:, ids.shape[1] :].tolist()]


def _likelihoods(
    settings: SftSettings, model: Any, tokenizer: Any, problems: Sequence[Mapping[str, str]]
) -> list[float]:
    """e^{−loss} of each reference response, in (0, 1]: smoother than accuracy, for models that solve little."""
    from tokencredit.recipes.signals.forward import Scorer, score_samples

    scorer = Scorer(model=model, tokenizer=tokenizer, name="", revision="", max_length=settings.max_length)
    conversations = [
        [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["reference"] or p["answer"]}]
        for p in problems
    ]
    columns, _ = score_samples(scorer, conversations)
    return np.exp(-columns["loss"].astype(np.float64)).tolist()


def _left_pad(rows: Sequence[list[int]], pad: int) -> tuple[Any, Any]:
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = True
    return ids, mask
