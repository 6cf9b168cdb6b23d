"""Sampling for evaluation: the distribution that training samples from, in batches, beside the run's random streams."""

import contextlib
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

ROWS = 64  # responses per call of `generate` without a trainer


@contextlib.contextmanager
def own_stream(seed: int) -> Iterator[None]:
    """Seed all random generators, and put every one of them back afterwards: an evaluation moves no number of a run.

    These are Python's, NumPy's, and torch's on the CPU, on every CUDA device and on MPS.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    cuda = [torch.cuda.get_rng_state(device) for device in devices]
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
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
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


@torch.no_grad()
def _generate(model: Any, material: Any, rows: list[list[int]]) -> list[list[int]]:
    from transformers import GenerationConfig

    model.eval()
    tokenizer = material.tokenizer
    ends = end_tokens(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=material.max_response,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    with _instead_of_shipped(model, plain):
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
    return [_until_end(row, ends) for row in whole[:, width:].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's, and those of the model's generation_config."""
    shipped = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = shipped if isinstance(shipped, list | tuple) else [shipped]
    return [int(token) for token in dict.fromkeys([tokenizer.eos_token_id, *more]) if token is not None]


@contextlib.contextmanager
def _instead_of_shipped(model: Any, config: Any) -> Iterator[None]:
    """Replace the model's generation_config: `generate` fills in from it whatever a request leaves out."""
    shipped = getattr(model, "generation_config", None)
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    first = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if first is None else ids[: first + 1]
