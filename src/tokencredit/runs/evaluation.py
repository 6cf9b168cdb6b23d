"""Evaluation on held-out problems: exact where the accepted responses can be listed, by sampling elsewhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokencredit.collect.prompts import prompt_ids
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import Task
from tokencredit.runs import processes, sampling
from tokencredit.runs.config.run_config import EvaluationSettings
from tokencredit.runs.data.material import Material
from tokencredit.runs.data.rewards import Scores, score
from tokencredit.seeds import derive

Metrics = dict[str, Any]
Evaluate = Callable[[Any], Metrics]
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # a forward gathers weights from all processes

# Metrics that trackers get, as eval/…; the others are lists or settings.
TRACKED = ("reward", "success", "unscored")


def evaluator(settings: EvaluationSettings, material: Material, trainer: Any = None) -> Evaluate | None:
    """Build the function that evaluates a model.

    On a lab task success is exact. On a data set every problem gets `evaluation.samples` responses, sampled and scored
    as in training. With a `trainer` its generation, rewards and state are used, the problems are divided among its
    processes, and the numbers are logged to its trackers.

    Args:
      settings: the `evaluation:` section of the config.
      material: what the run trains and evaluates on.
      trainer: TRL's trainer, if there is one.

    Returns:
      A function from a model to metrics; see docs/report.md for their names. None where there is nothing to evaluate
      on, and on processes that take no part.
    """
    if material.task is not None:
        sharded = trainer is not None and str(trainer.accelerator.distributed_type.value) in SHARDED
        if not (sharded or processes.is_main()):
            return None
        evaluate = _exact(material.task, material.tokenizer, settings.problems)
    else:
        if material.evaluation is None or (trainer is None and not processes.is_main()):
            return None
        evaluate = _sampled(material, settings, trainer)
    return evaluate if trainer is None else _logged(evaluate, trainer)


def _exact(task: Task, tokenizer: Any, count: int) -> Evaluate:
    """V(x) = Σ_c π(c | x) over the accepted responses: no sampling noise, the same problems in every run."""
    problems = task.problems("test", count)

    def evaluate(model: Any) -> Metrics:
        values = success_probability(model, tokenizer, task, problems).tolist()
        return {"success": sum(values) / len(values), "per_problem": values}

    return evaluate


def _sampled(material: Material, settings: EvaluationSettings, trainer: Any) -> Evaluate:
    samples, threshold = settings.samples, float(settings.threshold)
    problems = [dict(row) for row in material.evaluation or ()]
    size, rank = (1, 0) if trainer is None else (processes.size(), processes.rank())
    # Every process takes the same number of problems, so that all of them make the same calls.
    shares = [
        [index % len(problems) for index in range(first, size * -(-len(problems) // size), size)]
        for first in range(size)
    ]

    def evaluate(model: Any) -> Metrics:
        with sampling.own_stream(derive("evaluation", rank)):
            rewards, logged = _rewards(model, material, [problems[index] for index in shares[rank]], samples, trainer)
        scored: dict[int, list[float | None]] = {}
        for share, values in zip(shares, _gather(rewards, size), strict=True):
            scored |= dict(zip(share, values, strict=True))
        return logged | summarise([scored[index] for index in range(len(problems))], threshold)

    return evaluate


def _gather(values: list[Any], size: int) -> list[list[Any]]:
    if size == 1:
        return [values]
    import torch

    gathered: list[Any] = [None] * size
    torch.distributed.all_gather_object(gathered, values)
    return gathered


def _rewards(
    model: Any, material: Material, problems: Sequence[Mapping[str, Any]], samples: int, trainer: Any = None
) -> tuple[list[list[float | None]], dict[str, float]]:
    """Sample `samples` responses to each problem and score them; a list of rewards per problem, and logged metrics."""
    options = _chat_options(trainer)
    ids = [prompt_ids(material.tokenizer, problem["prompt"], **options) for problem in problems]
    responses = sampling.sample_responses(model, material, ids, samples, trainer)
    columns: dict[str, list[Any]] = {
        name: [problem.get(name) for problem in problems for _ in range(samples)]
        for name in dict.fromkeys(name for problem in problems for name in problem)
        if name not in ("prompt", "completion", "completion_ids")
    }
    columns["prompts"] = [problem["prompt"] for problem in problems for _ in range(samples)]
    columns["completions"] = _completions(material.tokenizer, columns["prompts"], responses)
    columns["completion_ids"] = responses
    scores = _score(columns, material, trainer, options["chat_template_kwargs"])
    rows = range(0, len(scores.rewards), samples)
    return [scores.rewards[row : row + samples] for row in rows], scores.metrics


def _score(columns: Mapping[str, list[Any]], material: Material, trainer: Any, template_kwargs: Any) -> Scores:
    """Score with the run's rewards, as the trainer holds them where there is one."""
    if trainer is None:
        weights = material.reward_weights or [1.0] * len(material.rewards)
        return score(material.rewards, weights, columns, chat_template_kwargs=template_kwargs)
    return score(
        trainer.reward_funcs,
        trainer.args.reward_weights or [1.0] * len(trainer.reward_funcs),
        columns,
        processors=trainer.reward_processing_classes,
        chat_template_kwargs=template_kwargs,
        state=trainer.state,
    )


def _chat_options(trainer: Any) -> dict[str, Any]:
    """What the chat template gets in training."""
    options = {name: getattr(trainer, name, None) for name in ("chat_template_kwargs", "tools", "chat_template")}
    return options | {"chat_template_kwargs": options["chat_template_kwargs"] or {}}


def _completions(tokenizer: Any, prompts: Sequence[Any], responses: list[list[int]]) -> list[Any]:
    """The responses as TRL hands them to reward functions: texts, or one assistant turn each."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    if isinstance(prompts[0], str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def summarise(rewards: Sequence[Sequence[float | None]], threshold: float) -> Metrics:
    """Reduce the rewards of every problem's responses to the metrics of an evaluation.

    Args:
      rewards: one list per problem; None for a response that no reward function scored.
      threshold: a response succeeds if its reward is above it.

    Returns:
      `reward` (mean), `success` (share of responses above the threshold), both as means over problems, and per problem;
      `threshold`; `binary` (whether all rewards are 0 or 1); `unscored` responses. Problems without a scored response
      are left out, and then `problems` lists those that count.
    """
    kept = [(index, [value for value in row if value is not None]) for index, row in enumerate(rewards)]
    kept = [(index, row) for index, row in kept if row]
    flat = [value for _, row in kept for value in row]
    means = [math.fsum(row) / len(row) for _, row in kept]
    shares = [sum(value > threshold for value in row) / len(row) for _, row in kept]
    metrics: Metrics = {
        "per_problem": means,
        "per_problem_success": shares,
        "threshold": threshold,
        "binary": all(value in (0.0, 1.0) for value in flat),
        "unscored": sum(map(len, rewards)) - len(flat),
    }
    if kept:
        metrics |= {"reward": math.fsum(means) / len(means), "success": math.fsum(shares) / len(shares)}
    if len(kept) < len(rewards):
        metrics["problems"] = [index for index, _ in kept]
    return metrics


def _logged(evaluate: Evaluate, trainer: Any) -> Evaluate:
    """Send an evaluation's numbers to the trainer's trackers as eval/reward, eval/success, …"""
    from transformers import Trainer

    def evaluate_and_log(model: Any) -> Metrics:
        metrics = evaluate(model)
        numbers = {
            f"eval_{name}": value
            for name, value in metrics.items()
            if name in TRACKED or (isinstance(value, float) and name != "threshold")
        }
        # The base class: TRL's own `log` would print its table of completions once more. Logging tells the trainer
        # that this step is logged, and its own metrics are still to come.
        should_log = trainer.control.should_log
        Trainer.log(trainer, numbers)
        trainer.control.should_log = should_log
        return metrics

    return evaluate_and_log


def _mean_reward(model: Any, material: Any, row: Mapping[str, Any], samples: int) -> float:
    """Mean reward of `samples` responses to one prompt, for checks outside a run; 0 if none was scored."""
    source = Material(None, material.tokenizer, None, [material.reward], material.max_response)
    (rewards,), _ = _rewards(model, source, [row], samples)
    scored = [value for value in rewards if value is not None]
    return sum(scored) / max(1, len(scored))
