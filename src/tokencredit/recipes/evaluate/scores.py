"""Scores of problems under a fine-tuned model: greedy accuracy, or the likelihood of the reference."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from tokencredit.collect.generate import generate_ids, pad_left
from tokencredit.collect.models import eval_mode
from tokencredit.lab import sampler
from tokencredit.recipes.evaluate.problems import Problem
from tokencredit.recipes.evaluate.records import Metrics, TaskScore
from tokencredit.recipes.pool.encode import encode_prompt
from tokencredit.recipes.signals.forward import score_samples
from tokencredit.recipes.signals.load import Scorer
from tokencredit.seeds import derive

Scores = Sequence[float | None]  # None where no answer can be read: wrong, and counted


@runtime_checkable
class GenerationSettings(Protocol):
    """The settings that generation reads."""

    @property
    def eval_batch(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...


def metrics_of(problems: Sequence[Problem], scores: Scores, train: Mapping[str, float]) -> Metrics:
    """Means of the tasks from the scores of their items."""
    tasks = {}
    for task in dict.fromkeys(problem["task"] for problem in problems):
        ours = [score for problem, score in zip(problems, scores, strict=True) if problem["task"] == task]
        mean = float(np.mean([score or 0.0 for score in ours]))
        tasks[task] = TaskScore(score=mean, n=len(ours), parse_fail=ours.count(None))
    items = {(problem["task"], problem["id"]): score or 0.0 for problem, score in zip(problems, scores, strict=True)}
    return Metrics(tasks=tasks, items=items, train=train)


def accuracies(responses: Sequence[str], problems: Sequence[Problem], pattern: str) -> Scores:
    """Score 1 where the answer that `pattern` finds in a response is the problem's, else 0."""
    scores: list[float | None] = []
    for response, problem in zip(responses, problems, strict=True):
        match = re.search(pattern, response)
        scores.append(None if match is None else float(match[1].strip() == problem["answer"].strip()))
    return scores


def likelihoods(model: Any, tokenizer: Any, problems: Sequence[Problem], max_length: int) -> Scores:
    """e^{−loss} of each reference response, in (0, 1]: smoother than accuracy, for models that solve little."""
    scorer = Scorer(model=model, tokenizer=tokenizer, name="", revision="", max_length=max_length)
    conversations = [
        [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["reference"] or p["answer"]}]
        for p in problems
    ]
    columns, _ = score_samples(scorer, conversations)
    return np.exp(-columns["loss"].astype(np.float64)).tolist()


def generate(settings: GenerationSettings, model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy responses; the lab's sampler where it knows the model, Hugging Face's elsewhere.

    A response ends with any of the model's end tokens. Nothing of the model's generation config but those enters: no
    repetition penalty, no shortest length. The model trains or not afterwards as it did before.
    """
    ends = sampler.end_ids(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), settings.eval_batch):
        batch = order[start : start + settings.eval_batch]
        encoded = [encode_prompt(tokenizer, prompts[row]) for row in batch]
        with eval_mode(model):
            new_ids = _greedy(model, encoded, ends, pad, settings.max_new_tokens)
        for row, tokens in zip(batch, new_ids, strict=True):
            stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            texts[row] = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    return [texts[row] for row in range(len(prompts))]


@torch.no_grad()
def _greedy(model: Any, prompts: Sequence[list[int]], ends: list[int], pad: int, steps: int) -> list[list[int]]:
    """The most probable continuation of each prompt, with whatever follows its end token."""
    if sampler.unsupported(model) is not None:
        return generate_ids(model, prompts, max_new_tokens=steps, ends=ends, temperature=0.0, pad=pad)
    device = next(model.parameters()).device  # the trainer has moved the model to its device
    new = sampler.sample(
        model,
        *pad_left(prompts, device, pad),
        max_new_tokens=steps,
        eos_token_id=ends,
        generator=torch.Generator().manual_seed(derive("greedy")),
        temperature=0.0,
    )
    return [tokens[kept].tolist() for tokens, kept in zip(new.ids, new.mask, strict=True)]
