"""Collectors that `CreditGRPOTrainer` brings for fields that TRL's own passes do not give."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.adapters.trl_batch import Rollout
from tokencredit.collect.adapter import adapter_residuals
from tokencredit.collect.attention import attention_entropies
from tokencredit.collect.teacher import Teacher, build_teacher

Collector = Callable[[Rollout], Tensor]

TEACHER_FILE = "teacher.safetensors"  # in a checkpoint: what a teacher with moving weights must keep


def built_in(teacher: Teacher | None) -> dict[str, Collector]:
    """Collectors by field; the teacher's only where there is a teacher."""
    found: dict[str, Collector] = {
        "adapter_residuals": _adapter_residuals,
        "attention_entropies": _attention_entropies,
    }
    if teacher is not None:
        found["teacher_logprobs"] = lambda rollout: _teacher_logprobs(teacher, rollout)
    return found


def as_teacher(teacher: Any) -> Teacher | None:
    """A teacher as it is, or built from a mapping such as `{"kind": "model", "model": path}`."""
    return build_teacher(teacher) if isinstance(teacher, Mapping) else teacher


def _adapter_residuals(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """Two passes of the backbone without logits, in eval mode."""
    ids, mask, prompt, response = rollout.sequences()
    return adapter_residuals(rollout.model, ids, mask, prompt, response)[0]


def _attention_entropies(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """One pass up to the middle layer."""
    ids, mask, prompt, response = rollout.sequences()
    return attention_entropies(rollout.model, ids, mask, prompt, response)


def _teacher_logprobs(teacher: Teacher, rollout: Rollout) -> Float[Tensor, "batch response"]:
    rows: list[Mapping[str, Any]] = list(rollout.columns)
    if teacher.needs_attempts:
        rows = [{**row, "attempt": text} for row, text in zip(rows, attempts(rollout), strict=True)]
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    return teacher.score(
        prompts, rollout.response_ids, rollout.response_mask, rows, rollout.temperature, policy=rollout.model
    )


def attempts(rollout: Rollout) -> list[str | None]:
    """The text of another response to the same prompt that earned more than the group's mean, or None.

    Responses of other processes are not seen.
    """
    texts = [
        rollout.tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    groups, rewards = rollout.group_ids.tolist(), rollout.rewards.tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    found: list[str | None] = []
    for row, group in enumerate(groups):
        mean = sum(rewards[other] for other in members[group]) / len(members[group])
        better = [other for other in members[group] if other != row and rewards[other] > mean]
        found.append(texts[better[0]] if better else None)
    return found


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
