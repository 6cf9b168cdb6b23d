"""Collectors that `CreditGRPOTrainer` brings for fields that TRL's own passes do not give."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.adapters.trl.batch import Rollout
from tokencredit.adapters.trl.passes import is_sharded
from tokencredit.collect.adapter_residual import adapter_residuals, doubling_ratio, reference_logprobs, reference_pass
from tokencredit.collect.attention.answer import answer_importances, answer_mask
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.attention.rhythms import attention_rhythms
from tokencredit.collect.teacher.build import LocalTeacher, Teacher, build_teacher, resolve_teacher
from tokencredit.collect.teacher.model import SelfTeacher
from tokencredit.collect.teacher.prompts import better_attempts, response_texts
from tokencredit.collect.token_texts import batch_token_texts
from tokencredit.errors import TokenCreditError

Collector = Callable[[Rollout], Tensor]

TEACHER_FILE = "teacher.safetensors"  # in a checkpoint: what a teacher with moving weights must keep


def built_in(
    options: Mapping[str, Mapping[str, Any]], teacher: Teacher | None, *, adapter: bool
) -> dict[str, Collector]:
    """Collectors by field: those of a LoRA model only where there is an adapter, the teacher's only with a teacher."""
    rhythm = options["attention_distances"]
    passes: dict[str, Collector] = {
        "attention_entropies": lambda rollout: _in_parts(rollout, _attention_entropies, options["attention_entropies"]),
        "attention_distances": lambda rollout: _rhythms(rollout, rhythm)[0],
        "attention_influences": lambda rollout: _rhythms(rollout, rhythm)[1],
        "importances": lambda rollout: _counted_importances(rollout, options["importances"]),
    }
    if adapter:
        layer = options["adapter_residuals"]["layer"]
        rows = options["doubling_ratios"]["rows"]
        passes |= {
            "adapter_residuals": lambda rollout: _in_parts(rollout, _adapter_residuals, {"layer": layer}),
            "doubling_ratios": lambda rollout: _doubling_ratios(rollout, layer, rows),
        }
    found = {name: _text_pass(name, measure) for name, measure in passes.items()}
    if adapter:
        found["ref_logprobs"] = _reference_logprobs
    if isinstance(teacher, LocalTeacher):
        found["teacher_logprobs"] = lambda rollout: _teacher_both(teacher, rollout)[0]
        found["teacher_entropies"] = lambda rollout: _teacher_both(teacher, rollout)[1]
    elif teacher is not None:
        found["teacher_logprobs"] = lambda rollout: _teacher_scores(teacher.score, teacher, rollout)
    return found


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


def _text_pass(name: str, measure: Collector) -> Collector:
    """A collector whose pass runs the text decoder alone and reads whole parameters; refuses what it cannot see."""

    def collector(rollout: Rollout) -> Tensor:
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
        return measure(rollout)

    return collector


def _in_parts(rollout: Rollout, measure: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """`measure(part, **options)` of a micro-batch at a time, in the host's precision, put together again."""
    with rollout.autocast():
        found = [measure(part, **options) for part in rollout.parts()]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(values) for values in zip(*found, strict=True))
    return torch.cat(found)


def _adapter_residuals(rollout: Rollout, layer: Any) -> Float[Tensor, "batch response"]:
    """Two passes of the backbone without logits, in eval mode."""
    return adapter_residuals(rollout.model, *rollout.sequences(), layer=layer)[0]


def _doubling_ratios(rollout: Rollout, layer: Any, rows: int) -> Float[Tensor, " batch"]:
    """Three passes over the first `rows` responses; all responses of this process get the one number."""
    ids, mask, prompt, response = rollout.sequences()
    with rollout.autocast():
        ratio = doubling_ratio(rollout.model, ids[:rows], mask[:rows], prompt, response, layer)
    return torch.full((len(ids),), ratio, device=ids.device)


def _reference_logprobs(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """One pass with the adapter off, where the host runs no KL reference: the host's own, as the policy's is."""
    if rollout.score is None:
        return reference_logprobs(rollout.model, *rollout.sequences(), temperature=rollout.temperature)
    with reference_pass(rollout.model):
        return rollout.score()[0]


def _attention_entropies(rollout: Rollout, **options: Any) -> Float[Tensor, "batch response"]:
    """One pass up to the layer."""
    return attention_entropies(rollout.model, *rollout.sequences(), **options)


def _rhythms(rollout: Rollout, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """WAAD and FAI from one pass, whichever is asked for first."""

    def measure(part: Rollout) -> tuple[Tensor, Tensor]:
        return attention_rhythms(part.model, *part.sequences(), **options)

    if "rhythms" not in rollout.shared:
        rollout.shared["rhythms"] = _in_parts(rollout, measure, {})
    return rollout.shared["rhythms"]


def _counted_importances(rollout: Rollout, options: Mapping[str, Any]) -> Float[Tensor, "batch response"]:
    """`_importances`; logs the share of responses without the text `after`: their answer is their last tokens."""
    if options["after"] is not None:
        rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
        texts = [rollout.tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]
        missing = sum(options["after"] not in text for text in texts)
        rollout.metrics["importances_without_marker"] = missing / max(len(texts), 1)
    return _in_parts(rollout, _importances, options)


def _importances(rollout: Rollout, after: str | None, tail: int, layer: int | None) -> Float[Tensor, "batch response"]:
    """How much the answer, by text or by length, attends to the tokens before it."""
    texts = None
    if after is not None:
        rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
        texts = batch_token_texts(rollout.tokenizer, [ids[mask].tolist() for ids, mask in rows])
    answer = answer_mask(rollout.response_mask, texts, after, tail)
    return answer_importances(rollout.model, *rollout.sequences(), answer=answer, layer=layer)


def _teacher_scores(score: Callable[..., Any], teacher: Teacher, rollout: Rollout) -> Any:
    """Ask `score`, a method of the teacher, for the sampled tokens."""
    if rollout.inputs:
        raise TokenCreditError(
            f"a {type(teacher).__name__} scores text alone, and these rows also hold "
            f"{', '.join(sorted(rollout.inputs))}",
            hint="for a vision-language model use a teacher of kind `self` or `base` without `template`",
        )
    given = _prompt_ids(rollout), rollout.response_ids, rollout.response_mask, _teacher_rows(teacher, rollout)
    return score(*given, rollout.temperature, policy=rollout.model)


def _teacher_both(teacher: LocalTeacher, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from one pass, whichever of the two is asked for first."""
    if "teacher" not in rollout.shared:
        own = isinstance(teacher, SelfTeacher) and rollout.score is not None
        found = (
            _self_scores(teacher, rollout) if own else _teacher_scores(teacher.score_with_entropies, teacher, rollout)
        )
        rollout.shared["teacher"] = found
    return rollout.shared["teacher"]


def _self_scores(teacher: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """A teacher that is the policy with other weights or another prompt, by the pass that scores the student."""
    assert rollout.score is not None
    rows, prompts = _teacher_rows(teacher, rollout), _prompt_ids(rollout)
    with teacher.opened(prompts, rollout.response_mask, rows, rollout.model) as (_, seen):
        return rollout.score(None if teacher.prompts.text is None else seen, teacher.given["batch_size"])


def _prompt_ids(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]


def _teacher_rows(teacher: Teacher, rollout: Rollout) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = list(rollout.columns)
    if not teacher.needs_attempts:
        return rows
    return [{**row, "attempt": text} for row, text in zip(rows, attempts(rollout), strict=True)]


def attempts(rollout: Rollout) -> list[str | None]:
    """`better_attempts` of the responses of this process; those of other processes are not seen.

    A response without a score is nobody's better attempt, and has none itself: its credit is 0.
    """
    texts = response_texts(rollout.tokenizer, rollout.response_ids, rollout.response_mask)
    groups, rewards = rollout.group_ids.tolist(), rollout.rewards.tolist()
    scored = [True] * len(texts) if rollout.scored is None else rollout.scored.tolist()
    rows = [row for row, there in enumerate(scored) if there]
    better = better_attempts(
        [texts[row] for row in rows], [groups[row] for row in rows], [rewards[row] for row in rows]
    )
    found: list[str | None] = [None] * len(texts)
    for row, text in zip(rows, better, strict=True):
        found[row] = text
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
