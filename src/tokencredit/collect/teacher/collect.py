"""The collector of teachers: log-probs and entropies of the sampled tokens of a `Rollout`."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.rollout import Rollout
from tokencredit.collect.teacher.base import TeacherRequest
from tokencredit.collect.teacher.build import LocalTeacher
from tokencredit.collect.teacher.model import SelfTeacher
from tokencredit.collect.teacher.prompts import better_attempts, response_texts
from tokencredit.errors import TokenCreditError


def teacher_scores(rollout: Rollout) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"] | None]:
    """The teacher's log-probs, and its entropies where its whole distribution can be read here, from one pass."""
    teacher = rollout.teacher
    if isinstance(teacher, SelfTeacher) and rollout.score is not None:
        return _self_scores(teacher, rollout)
    if rollout.inputs:
        raise TokenCreditError(
            f"a {type(teacher).__name__} scores text alone, and these rows also hold "
            f"{', '.join(sorted(rollout.inputs))}",
            hint="for a vision-language model use a teacher of kind `self` or `base` without `template`",
        )
    request = TeacherRequest(
        rollout.prompts(),
        rollout.response_ids,
        rollout.response_mask,
        _rows_of(rollout),
        rollout.temperature,
        rollout.model,
    )
    if isinstance(teacher, LocalTeacher):
        return teacher.score_with_entropies(request)
    return teacher.score(request), None


def _self_scores(teacher: SelfTeacher, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """A teacher that is the policy with other weights or another prompt, by the pass that scores the student."""
    assert rollout.score is not None
    opened = teacher.opened(rollout.prompts(), rollout.response_mask, _rows_of(rollout), rollout.model)
    with opened as (_, prompts):
        return rollout.score(None if teacher.prompts.text is None else prompts, teacher.given["batch_size"])


def _rows_of(rollout: Rollout) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = list(rollout.columns)
    if not rollout.teacher.needs_attempts:
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
    attempt: list[str | None] = [None] * len(texts)
    for row, text in zip(rows, better, strict=True):
        attempt[row] = text
    return attempt
