"""Collectors and teachers inside TRL's trainer: which there are, what they refuse, and what a checkpoint keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.collect.models import is_sharded
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import TABLE, Collector
from tokencredit.collect.teacher.build import LocalTeacher, Teacher, build_teacher, resolve_teacher
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.plugins import load_attribute

TEACHER_FILE = "teacher.safetensors"  # in a checkpoint: what a teacher with moving weights must keep

CollectorFunction = Callable[[Rollout], Tensor]


def built_in(
    options: Mapping[str, Mapping[str, Any]], teacher: Teacher | None, *, adapter: bool
) -> dict[str, CollectorFunction]:
    """Collectors by field: those of a LoRA model only where there is an adapter, the teacher's only with a teacher."""
    there = {None: True, "adapter": adapter, "teacher": teacher is not None}
    there["local teacher"] = isinstance(teacher, LocalTeacher)
    return {
        name: _collector_of(name, row, options[name])
        for name, row in TABLE.items()
        if row.function is not None and there.get(row.needs)
    }


def _collector_of(name: str, row: Collector, options: Mapping[str, Any]) -> CollectorFunction:
    """The function of a row with its options; fields of one function are filled by one call."""

    def measure(rollout: Rollout) -> Any:
        return load_attribute(str(row.function), f"the collector of {name}")(rollout, **options)

    def collector(rollout: Rollout) -> Tensor:
        if row.text_only:
            _check_text_pass(name, rollout)
        if row.output is None:
            return measure(rollout)
        if row.function not in rollout.shared:
            rollout.shared[row.function] = measure(rollout)
        return rollout.shared[row.function][row.output]

    return collector


def _check_text_pass(name: str, rollout: Rollout) -> None:
    """Refuse what a pass that runs the text decoder alone, and reads whole parameters, cannot see."""
    if rollout.inputs:
        raise TokenCreditError(
            f"the collector of `{name}` runs a pass on token ids alone, and these rows also hold "
            f"{', '.join(sorted(rollout.inputs))}: it would measure {type(rollout.model).__name__} without them",
            hint="for a vision-language model choose a method that reads log-probs or entropies, such as hapo, or "
            f"give a collector of your own: `collectors={{{name!r}: function}}`",
        )
    if is_sharded(rollout.model):
        raise TokenCreditError(
            f"the collector of `{name}` runs a pass outside the wrapper that gathers sharded parameters",
            hint="train with DDP, or choose a method that reads log-probs or entropies, such as hapo",
        )


def as_teacher(teacher: Any) -> Teacher | None:
    """A teacher as it is, or built from a mapping such as `{"kind": "model", "model": path}`."""
    return build_teacher(teacher) if isinstance(teacher, Mapping) else teacher


def check_teacher(teacher: Any) -> None:
    """Refuse what is neither a teacher nor the description of one, also where the pipeline asks no teacher."""
    if isinstance(teacher, Mapping):
        resolve_teacher(teacher)
    elif teacher is not None and not isinstance(teacher, Teacher):
        raise TokenCreditError(
            f"`teacher` must be a mapping with `kind`, or a `Teacher`, got {teacher!r}",
            hint="for example teacher={'kind': 'model', 'model': 'path/to/checkpoint'}",
        )


def check_vision(teacher: Teacher, processing_class: Any) -> None:
    """Refuse a privileged prompt beside images: it would be rendered without them."""
    text = getattr(getattr(teacher, "prompts", None), "text", None)
    if text is not None and hasattr(processing_class, "image_processor"):
        raise TokenCreditError(
            f"a teacher's template renders text alone, and {type(processing_class).__name__} also takes images",
            hint="leave out `template`: teachers of kind `self` (weights: frozen, ema, base) then see the images too",
        )


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
