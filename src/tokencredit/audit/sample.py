"""Responses of a model to the problems of a task, with rewards and the columns that teachers and lists read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokencredit.audit.settings import AuditSettings
from tokencredit.collect.exact.values import ExactValues
from tokencredit.collect.generate import generate_ids, pad_left
from tokencredit.collect.prompts import prompt_ids
from tokencredit.collect.rollout import Rollout
from tokencredit.errors import TokenCreditError
from tokencredit.lab.data import reward_function
from tokencredit.lab.natural import is_natural, parse_task, reward_functions
from tokencredit.lab.sampler import end_ids
from tokencredit.lab.tasks import Problem, get_task
from tokencredit.progress import track
from tokencredit.seeds import derive

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """The problems of a task as the model sees them.

    * `rows`: one per prompt, with `prompt` (a text or messages) and the columns that rewards and teachers read.
    * `reward`: TRL's kind of function. `collectors`: of fields that the task itself knows, such as exact values.
    * `chat`: whether prompts are messages for the model's chat template.
    """

    rows: Sequence[Row]
    reward: Callable[..., Any]
    collectors: Mapping[str, Callable[[Rollout], Any]]
    chat: bool


def problems_of(settings: AuditSettings, tokenizer: Any) -> Problems:
    """Draw the problems; questions become user turns where the tokenizer has a chat template."""
    assert settings.task is not None
    if is_natural(settings.task):
        task = parse_task(settings.task)
        chat = tokenizer.chat_template is not None
        rows = []
        for problem in task.problems("test", settings.prompts, settings.seed):
            text = task.prompt(problem["question"])
            prompt: Any = [{"role": "user", "content": text}] if chat else text
            rows.append({**problem, "prompt": prompt})
        return Problems(rows=rows, reward=reward_functions(task)["correct"], collectors={}, chat=chat)
    lab = get_task(settings.task)
    listed = [
        {"prompt": problem.prompt, "problem": problem.to_json(), "answer": lab.accepted(problem)[0]}
        for problem in lab.problems("test", settings.prompts, settings.seed)
    ]

    def accepted(row: Row) -> list[str]:
        return lab.accepted(Problem.from_json(row["problem"]))

    values = ExactValues(accepted, max_tokens=settings.max_tokens)
    return Problems(rows=listed, reward=reward_function(lab), collectors={"values": values}, chat=False)


def sample_rollout(model: Any, tokenizer: Any, problems: Problems, settings: AuditSettings) -> Rollout:
    """Sample `samples` responses per prompt and reward them.

    Raises:
      TokenCreditError: the tokenizer has no end token, or a prompt and a response exceed the model's context.
    """
    ends = end_ids(model, tokenizer)
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in problems.rows]
    _check_context(model, prompts, settings.max_tokens)
    responses = _sample(model, prompts, ends, settings)
    columns = [row for row in problems.rows for _ in range(settings.samples)]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    named = {key: [row[key] for row in columns] for key in columns[0] if key != "prompt"}
    completions = [[{"role": "assistant", "content": text}] for text in texts] if problems.chat else texts
    prompted = [row["prompt"] for row in columns]
    rewards = problems.reward(prompts=prompted, completions=completions, completion_ids=responses, **named)
    return rollout_of(
        model,
        tokenizer,
        [ids for ids in prompts for _ in range(settings.samples)],
        responses,
        rewards,
        columns,
        settings,
    )


def _sample(model: Any, prompts: list[list[int]], ends: list[int], settings: AuditSettings) -> list[list[int]]:
    """A batch per prompt, each from its own random stream: more prompts change no response."""
    devices = [model.device] if model.device.type == "cuda" else []
    responses: list[list[int]] = []
    with torch.random.fork_rng(devices=devices):
        for index, prompt in enumerate(track(prompts, "sampling")):
            torch.manual_seed(derive("audit", settings.seed, index) % 2**63)
            responses += generate_ids(
                model,
                [prompt],
                max_new_tokens=settings.max_tokens,
                ends=ends,
                samples=settings.samples,
                temperature=settings.temperature,
            )
    return responses


def _check_context(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if context is not None and len(prompts[longest]) + max_tokens > context:
        raise TokenCreditError(
            f"prompt {longest + 1} has {len(prompts[longest])} tokens, and with a response of {max_tokens} it exceeds "
            f"the {context} positions of the model",
            hint="lower --max-tokens, or choose shorter problems",
        )


def rollout_of(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float | None],
    columns: Sequence[Row],
    settings: AuditSettings,
) -> Rollout:
    """Prompts and responses of token ids as one rollout; a reward of None is a response without a score."""
    prompt, prompt_mask = pad_left(prompts, model.device)
    width = max(1, *(len(ids) for ids in responses))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in responses], device=model.device)
    lengths = torch.tensor([len(row) for row in responses], device=model.device)
    groups = {key: index for index, key in enumerate(dict.fromkeys(tuple(ids) for ids in prompts))}
    scored = torch.tensor([reward is not None for reward in rewards], device=model.device)
    return Rollout(
        model=model,
        tokenizer=tokenizer,
        prompt_ids=prompt,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=torch.arange(width, device=model.device) < lengths[:, None],
        rewards=torch.tensor([float(reward or 0.0) for reward in rewards], device=model.device),
        group_ids=torch.tensor([groups[tuple(ids)] for ids in prompts], device=model.device),
        columns=columns,
        temperature=settings.temperature,
        scored=None if bool(scored.all()) else scored,
        rows_per_pass=settings.rows_per_pass,
    )
