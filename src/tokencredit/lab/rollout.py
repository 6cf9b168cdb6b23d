"""`rollout_func` for TRL's `GRPOTrainer`: the fast sampler, seeded so that a resumed run samples what it would have."""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.lab.sampler import end_ids, sample
from tokencredit.seeds import derive

if TYPE_CHECKING:
    from trl import GRPOTrainer

ENTROPIES = "entropies"  # the key under which TRL writes each row's entropies into that row of the generation batch

# Sampling options of GRPOConfig that the sampler does not have, with the values that switch them off.
UNUSED: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "generation_kwargs": (None, {}),
    "use_vllm": (False,),
    "use_transformers_continuous_batching": (False,),
}


def rollout_func(prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[list[float]] | list[list[int]]]:
    """One response to each of `prompts`, which TRL passes with every prompt repeated for its group.

    Equal neighbours are prefilled once. `logprobs` become the batch's `sampling_per_token_logps`, which TRL's loss does
    not read unless `off_policy_mask_threshold` is set or vLLM is in use. `entropies` go into the rows of the generation
    batch, and so to the reward functions.
    """
    _check(trainer)
    repeats = [len(list(group)) for _, group in groupby(prompts)]
    ids = _tokenize([prompt for prompt, _ in groupby(prompts)], trainer)
    padded, mask = _pad_left(ids, trainer.accelerator.device)
    model = trainer.accelerator.unwrap_model(trainer.model)
    samples = sample(
        model,
        padded,
        mask,
        max_new_tokens=trainer.max_completion_length,
        temperature=trainer.temperature,
        eos_token_id=end_ids(model, trainer.processing_class),
        generator=_own_stream(prompts, trainer),
        num_return=repeats,
    )
    lengths = samples.mask.sum(1).tolist()
    return {
        "prompt_ids": [row for row, count in zip(ids, repeats, strict=True) for _ in range(count)],
        "completion_ids": _cut(samples.ids, lengths),
        "logprobs": _cut(samples.logprobs, lengths),
        ENTROPIES: _cut(samples.entropies, lengths),
    }


def rollout_seed(prompts: list[Any], trainer: "GRPOTrainer") -> int:
    """The seed of one generation batch: run, step, and which batch of the step it is; the same in all processes.

    An evaluation has no number within its step, so its prompts take that place.
    """
    run = (trainer.args.seed, trainer.state.global_step)
    if trainer.model.training:
        return derive("rollout", "train", *run, trainer._step % trainer.args.gradient_accumulation_steps)
    return derive("rollout", "eval", *run, json.dumps(prompts, sort_keys=True))


def _own_stream(prompts: list[Any], trainer: "GRPOTrainer") -> torch.Generator:
    """The stream of the whole batch behind the rows of the processes before this one, so that N sample as one does."""
    stream = torch.Generator().manual_seed(rollout_seed(prompts, trainer))
    before = trainer.accelerator.process_index * len(prompts)
    torch.rand(before, trainer.max_completion_length, generator=stream, dtype=torch.float64)
    return stream


def unsupported_options(arguments: Any) -> list[str]:
    """The sampling options of a GRPOConfig that the fast sampler does not have, as `name=value`."""
    values = {name: getattr(arguments, name, off[0]) for name, off in UNUSED.items()}
    return [f"{name}={value!r}" for name, value in values.items() if value not in UNUSED[name]]


def _check(trainer: "GRPOTrainer") -> None:
    for option in unsupported_options(trainer.args):
        name, _, value = option.partition("=")
        raise TokenCreditError(
            f"the fast sampler has no `{name}`, got {value}; it samples from the full softmax",
            hint=f"set `{name}` to {UNUSED[name][0]!r}, or leave out `rollout_func`",
        )


def _tokenize(prompts: list[Any], trainer: "GRPOTrainer") -> list[list[int]]:
    if isinstance(prompts[0], str):
        return trainer.processing_class(text=prompts)["input_ids"]
    return trainer.processing_class.apply_chat_template(
        conversation=prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(trainer.args.chat_template_kwargs or {}),
    )["input_ids"]


def _pad_left(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in ids)
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return padded, torch.arange(width, device=device) >= width - lengths[:, None]


def _cut(values: Tensor, lengths: list[int]) -> list[Any]:
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
