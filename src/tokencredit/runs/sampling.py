"""Sampling for evaluation: the distribution that training samples from, in batches, beside the run's random streams."""

import contextlib
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tokencredit.collect.generate import generate_ids
from tokencredit.lab.sampler import end_ids

ROWS = 64  # responses per call of `generate` without a trainer


@contextlib.contextmanager
def own_stream(seed: int) -> Iterator[None]:
    """Seed all random generators, and put every one of them back afterwards: an evaluation moves no number of a run.

    These are Python's, NumPy's, and torch's on the CPU, on every CUDA device and on MPS.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if torch.cuda.is_available():
        torch.cuda.init()  # before it there are no generators, and a seed would wait for them
    cuda = [(generator, generator.get_state()) for generator in torch.cuda.default_generators]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for generator, state in cuda:
            generator.set_state(state)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def sample_responses(
    model: Any, material: Any, prompts: Sequence[list[int]], samples: int, trainer: Any = None
) -> list[list[int]]:
    """Sample `samples` responses to each prompt, up to and with the first end token.

    With a trainer its own generation is used: vLLM, continuous batching or `generate`, with its sampling settings.
    Without one, the full softmax at temperature 1 is sampled. Neither reads the sampling settings of the model's
    shipped generation_config, except for its end tokens.

    Returns:
      One list of ids per response; the responses to a prompt are neighbours.
    """
    repeated = [ids for ids in prompts for _ in range(samples)]
    found: list[list[int]] = []
    for rows in _batches(repeated, samples, trainer):
        found += _generate(model, material, rows) if trainer is None else _generate_by(trainer, rows, samples)
    return found


def _batches(rows: list[list[int]], samples: int, trainer: Any) -> Iterator[list[list[int]]]:
    """Whole problems, as many as training generates at once; an engine that schedules by itself gets everything."""
    at_once = ROWS
    if trainer is not None:
        if _schedules(trainer):
            at_once = len(rows)
        else:
            at_once = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    step = max(1, at_once // samples) * samples
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _schedules(trainer: Any) -> bool:
    return bool(trainer.use_vllm or getattr(trainer, "use_transformers_continuous_batching", False))


def _generate_by(trainer: Any, rows: list[list[int]], samples: int) -> list[list[int]]:
    """Generate as the trainer does for its own evaluation."""
    from trl import GRPOTrainer

    parameters = inspect.signature(GRPOTrainer._generate_single_turn).parameters  # a subclass may hide them
    options = {"num_generations": samples} if "num_generations" in parameters else {}
    per_prompt = trainer.num_generations_eval
    was_training = trainer.model.training
    trainer.num_generations_eval = samples
    trainer.model.eval()
    try:
        found = trainer._generate_single_turn(rows, None, {}, **options)[0]
    finally:
        trainer.num_generations_eval = per_prompt
        trainer.model.train(was_training)
    return [[int(token) for token in ids] for ids in found]


def _generate(model: Any, material: Any, rows: list[list[int]]) -> list[list[int]]:
    ends = end_ids(model, material.tokenizer)
    pad = material.tokenizer.pad_token_id
    return generate_ids(model, rows, max_new_tokens=material.max_response, ends=ends, pad=pad)
