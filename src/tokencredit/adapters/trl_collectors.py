"""Collectors that `CreditGRPOTrainer` brings for fields that TRL's own passes do not give."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.adapters.trl_batch import Rollout
from tokencredit.collect.adapter import adapter_residuals, doubling_ratio, reference_logprobs
from tokencredit.collect.answer import answer_importances, answer_mask
from tokencredit.collect.attention import attention_entropies
from tokencredit.collect.attention_maps import attention_rhythms
from tokencredit.collect.teacher import LocalTeacher, Teacher, build_teacher
from tokencredit.collect.teacher_prompts import better_attempts, response_texts

Collector = Callable[[Rollout], Tensor]

TEACHER_FILE = "teacher.safetensors"  # in a checkpoint: what a teacher with moving weights must keep


def built_in(
    options: Mapping[str, Mapping[str, Any]], teacher: Teacher | None, *, adapter: bool
) -> dict[str, Collector]:
    """Collectors by field: those of a LoRA model only where there is an adapter, the teacher's only with a teacher."""
    rhythm = options["attention_distances"]
    found: dict[str, Collector] = {
        "attention_entropies": lambda rollout: _attention_entropies(rollout, options["attention_entropies"]),
        "attention_distances": lambda rollout: _rhythms(rollout, rhythm)[0],
        "attention_influences": lambda rollout: _rhythms(rollout, rhythm)[1],
        "importances": lambda rollout: _importances(rollout, **options["importances"]),
    }
    if adapter:
        layer = options["adapter_residuals"]["layer"]
        rows = options["doubling_ratios"]["rows"]
        found |= {
            "adapter_residuals": lambda rollout: _adapter_residuals(rollout, layer),
            "doubling_ratios": lambda rollout: _doubling_ratios(rollout, layer, rows),
            "ref_logprobs": _reference_logprobs,
        }
    if teacher is not None and not isinstance(teacher, LocalTeacher):
        found["teacher_logprobs"] = lambda rollout: _teacher_scores(teacher.score, teacher, rollout)
    if isinstance(teacher, LocalTeacher):
        found["teacher_logprobs"] = lambda rollout: _teacher_both(teacher, rollout)[0]
        found["teacher_entropies"] = lambda rollout: _teacher_both(teacher, rollout)[1]
    return found


def as_teacher(teacher: Any) -> Teacher | None:
    """A teacher as it is, or built from a mapping such as `{"kind": "model", "model": path}`."""
    return build_teacher(teacher) if isinstance(teacher, Mapping) else teacher


def _adapter_residuals(rollout: Rollout, layer: Any) -> Float[Tensor, "batch response"]:
    """Two passes of the backbone without logits, in eval mode."""
    return adapter_residuals(rollout.model, *rollout.sequences(), layer=layer)[0]


def _doubling_ratios(rollout: Rollout, layer: Any, rows: int) -> Float[Tensor, " batch"]:
    """Three passes over the first `rows` responses; all responses of this process get the one number."""
    ids, mask, prompt, response = rollout.sequences()
    ratio = doubling_ratio(rollout.model, ids[:rows], mask[:rows], prompt, response, layer)
    return torch.full((len(ids),), ratio, device=ids.device)


def _reference_logprobs(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """One pass with the adapter off, where the host runs no KL reference."""
    return reference_logprobs(rollout.model, *rollout.sequences(), temperature=rollout.temperature)


def _attention_entropies(rollout: Rollout, options: Mapping[str, Any]) -> Float[Tensor, "batch response"]:
    """One pass up to the layer."""
    return attention_entropies(rollout.model, *rollout.sequences(), **options)


def _rhythms(rollout: Rollout, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """WAAD and FAI from one pass, whichever is asked for first."""
    if "rhythms" not in rollout.shared:
        rollout.shared["rhythms"] = attention_rhythms(rollout.model, *rollout.sequences(), **options)
    return rollout.shared["rhythms"]


def _importances(rollout: Rollout, after: str | None, tail: int, layer: int | None) -> Float[Tensor, "batch response"]:
    """How much the answer, by text or by length, attends to the tokens before it."""
    texts = None
    if after is not None:
        rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
        texts = [rollout.tokenizer.batch_decode([[token] for token in ids[mask].tolist()]) for ids, mask in rows]
    answer = answer_mask(rollout.response_mask, texts, after, tail)
    return answer_importances(rollout.model, *rollout.sequences(), answer=answer, layer=layer)


def _teacher_scores(score: Callable[..., Any], teacher: Teacher, rollout: Rollout) -> Any:
    """What `score`, a method of the teacher, says of the sampled tokens."""
    rows: list[Mapping[str, Any]] = list(rollout.columns)
    if teacher.needs_attempts:
        rows = [{**row, "attempt": text} for row, text in zip(rows, attempts(rollout), strict=True)]
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    return score(prompts, rollout.response_ids, rollout.response_mask, rows, rollout.temperature, policy=rollout.model)


def _teacher_both(teacher: LocalTeacher, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from one pass, whichever of the two is asked for first."""
    if "teacher" not in rollout.shared:
        rollout.shared["teacher"] = _teacher_scores(teacher.score_with_entropies, teacher, rollout)
    return rollout.shared["teacher"]


def attempts(rollout: Rollout) -> list[str | None]:
    """`better_attempts` of the responses of this process; those of other processes are not seen."""
    texts = response_texts(rollout.tokenizer, rollout.response_ids, rollout.response_mask)
    return better_attempts(texts, rollout.group_ids.tolist(), rollout.rewards.tolist())


class TeacherCallback(TrainerCallback):
    """Moves a teacher with averaged weights after every step, and keeps it in the checkpoints."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.teacher.after_step(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = self.teacher.state()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if kept and state.is_world_process_zero:
            save_file({name: value.contiguous() for name, value in kept.items()}, folder / TEACHER_FILE)


def restore_teacher(teacher: Teacher, checkpoint: str | Path) -> None:
    """Give a teacher back what a checkpoint kept of it."""
    path = Path(checkpoint) / TEACHER_FILE
    if path.is_file():
        teacher.load_state(load_file(path))
