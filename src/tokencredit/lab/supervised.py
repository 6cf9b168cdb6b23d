"""Supervised fine-tuning on solution traces: how the lab's models are made."""

import math
import random

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokencredit.lab.tasks import Problem, Task
from tokencredit.progress import bar
from tokencredit.seeds import derive

POOL = 1500  # problems that the traces are about; their traces are drawn afresh at every step
WARMUP = 0.05  # share of the steps
FLOOR = 0.1  # final share of the learning rate


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    solved_share: float,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train `model` in place on random traces, `solved_share` of which solve their problem; the last losses' mean.

    Cross-entropy on response and EOS only, in nats per token. The problems come from the split "sft".
    """
    pool = task.problems("sft", POOL, seed)
    rng = random.Random(derive("lab traces", task.name, seed, str(solved_share)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses = []
    model.train()
    with bar(f"warm start {task.name}", steps) as advance:
        for _ in range(steps):
            problems = rng.choices(pool, k=batch)
            traces = [task.random_trace(problem, rng, rng.random() < solved_share) for problem in problems]
            input_ids, response_mask = collate(tokenizer, problems, traces)
            loss = model(input_ids=input_ids, labels=torch.where(response_mask, input_ids, -100), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def collate(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], responses: list[str]
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Prompt, response and EOS in one row, padded on the right; the mask is True on response and EOS.

    Right padding needs no attention mask: a causal model never looks at it from a token that counts.
    """
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    tails = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(responses)["input_ids"]]
    length = max(len(prompt) + len(tail) for prompt, tail in zip(prompts, tails, strict=True))
    input_ids = torch.full((len(problems), length), tokenizer.pad_token_id)
    response_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        input_ids[row, : len(prompt) + len(tail)] = torch.tensor(prompt + tail)
        response_mask[row, len(prompt) : len(prompt) + len(tail)] = True
    return input_ids, response_mask


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to `FLOOR`."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
