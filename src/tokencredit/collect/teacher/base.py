"""What is asked of a teacher, and what all teachers here have in common."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from tokencredit.collect.teacher.prompts import PromptRenderer, Row, first_rows


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRequest:
    """Sampled tokens that a teacher is to score.

    * `prompt_ids`: the student's prompts, without padding.
    * `rows`: those of the data set, which a privileged prompt may show.
    * `temperature`: the student's; log-probs are taken at it. `policy`: the student's model, for teachers that are it.
    """

    prompt_ids: list[list[int]]
    response_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    rows: Sequence[Row]
    temperature: float = 1.0
    policy: Any = None

    def first(self, count: int) -> "TeacherRequest":
        """The first rows."""
        names = ("prompt_ids", "response_ids", "response_mask", "rows")
        return replace(self, **{name: getattr(self, name)[:count] for name in names})


class BaseTeacher:
    """A teacher's config, its prompts, and the student's tokenizer once it has been checked."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.prompts = PromptRenderer(given)
        self.needs_attempts = self.prompts.needs_attempts
        self._student: Any = None

    def check(
        self,
        policy_tokenizer: Any,
        *,
        policy: Any = None,
        rows: Iterable[Mapping[str, Any]] = (),
        temperature: float = 1.0,
    ) -> None:
        """Refuse before training what could not be scored; `rows` are those of the training data."""
        rows = first_rows(rows)
        self._check_student(policy_tokenizer, policy, rows)
        self.prompts.check(rows, policy_tokenizer)
        self._student = policy_tokenizer
        self._check_scores(policy_tokenizer, temperature)

    def _check_student(self, tokenizer: Any, policy: Any, rows: Sequence[Row]) -> None:
        """Refuse another vocabulary, another chat template, another EOS, or a policy that cannot be taught."""

    def _check_scores(self, tokenizer: Any, temperature: float) -> None:
        """Refuse a teacher that does not give the numbers that are needed."""

    def after_step(self, policy: Any) -> None:
        """A fixed teacher does not move."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must be given back; nothing of a fixed teacher."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
