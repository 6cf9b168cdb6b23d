"""Scoring passes of our own, run as TRL runs its own: the same head, precision, micro-batches and model inputs.

A difference of two log-probs is credit, so both must come from one path. Then two policies that are equal differ by
exactly 0, in float32 and under autocast, instead of by the rounding of two kernels.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from trl import GRPOTrainer

from tokencredit.collect.generate import pad_left
from tokencredit.collect.models import causal_of, eval_mode, is_sharded
from tokencredit.collect.rollout import Sequences
from tokencredit.errors import TokenCreditError

Scores = tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]

# Arguments of TRL's scoring method that are not inputs of the model.
CONTROLS = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")


def sequences(inputs: Mapping[str, Any]) -> Sequences:
    """Prompts and completions of TRL's dictionary as one sequence."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    return Sequences(ids, mask, inputs["prompt_ids"].size(1), inputs["completion_ids"].size(1))


def prompt_rows(inputs: Mapping[str, Any]) -> list[list[int]]:
    """The prompts of TRL's dictionary without padding."""
    pairs = zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    return [ids[seen.bool()].tolist() for ids, seen in pairs]


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL keeps for the model beside token ids: images, their sizes and counts, token types."""
    accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    return {name: inputs[name] for name in accepted if name not in CONTROLS and inputs.get(name) is not None}


def as_scored(result: tuple[Any, ...]) -> dict[str, Tensor]:
    """Our names for what TRL's scoring method returns."""
    if result[1] is None:
        raise TokenCreditError(
            "the log-prob method of this trainer returns no entropies",
            hint="something replaced `_get_per_token_logps_and_entropies` (Unsloth does); train without it",
        )
    return {"old_logprobs": result[0].detach(), "entropies": result[1].detach()}


def score_rows(
    trainer: Any, inputs: Mapping[str, Any], *, model: Any = None, rows_per_pass: int | None = None
) -> dict[str, Tensor]:
    """Log-probs and entropies of the completions in `inputs`, by TRL's own pass without gradient and dropout."""
    ids, mask, _, width = sequences(inputs)
    with eval_mode(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        result = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model if model is None else model,
            ids,
            mask,
            width,
            batch_size=rows_per_pass or trainer.args.per_device_train_batch_size,
            compute_entropy=True,
            **model_inputs(inputs),
        )
    return as_scored(result)


@dataclass(frozen=True, slots=True)
class HostPass:
    """TRL's scoring pass over one rollout batch, for collectors and for teachers that are the policy itself."""

    trainer: Any
    inputs: Mapping[str, Any]

    def __call__(self, prompts: Sequence[Sequence[int]] | None = None, rows_per_pass: int | None = None) -> Scores:
        """Log-probs and entropies of the responses, after their own prompts or after `prompts`, 0 outside the mask.

        Rows whose prompt is their own are scored in TRL's layout, so that they get the bits that the student's pass
        gets. Other prompts are padded on the left, with position ids, `rows_per_pass` rows at a time.
        """
        if prompts is None:
            return self._own()
        own = prompt_rows(self.inputs)
        same = torch.tensor([list(one) == two for one, two in zip(prompts, own, strict=True)], dtype=torch.bool)
        sharded = is_sharded(self.trainer.model)  # then every process runs both passes, whatever its rows are
        if bool(same.all()) and not sharded:
            return self._own()
        found = self._privileged(prompts, rows_per_pass)
        if not bool(same.any()) and not sharded:
            return found
        kept = same.to(found[0].device)[:, None]
        first, second = (torch.where(kept, one, two) for one, two in zip(self._own(), found, strict=True))
        return first, second

    def _own(self) -> Scores:
        return self._masked(score_rows(self.trainer, self.inputs))

    def _privileged(self, prompts: Sequence[Sequence[int]], rows_per_pass: int | None) -> Scores:
        if images := model_inputs(self.inputs):
            raise TokenCreditError(
                f"a teacher's template shows text alone, and these rows also hold {', '.join(sorted(images))}",
                hint="leave out `template` for a vision-language model",
            )
        ids, mask = pad_left(prompts, self.inputs["prompt_ids"].device)
        changed = {**self.inputs, "prompt_ids": ids, "prompt_mask": mask.to(self.inputs["prompt_mask"].dtype)}
        model = Positioned(self.trainer.model)
        return self._masked(score_rows(self.trainer, changed, model=model, rows_per_pass=rows_per_pass))

    def _masked(self, scored: Mapping[str, Tensor]) -> Scores:
        mask = self.inputs["completion_mask"].bool()
        logprobs, entropies = (torch.where(mask, scored[n].float(), 0.0) for n in ("old_logprobs", "entropies"))
        return logprobs, entropies


class Positioned:
    """A model that counts positions from the first token that is seen, where it takes positions at all.

    A row's score then does not depend on how much padding the longest row of its batch puts before it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.takes = "position_ids" in inspect.signature(causal_of(model).forward).parameters

    def __call__(self, **inputs: Any) -> Any:
        if self.takes:
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(1) - 1).clamp_min(0)
        return self.model(**inputs)
