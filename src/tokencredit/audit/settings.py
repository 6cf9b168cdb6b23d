"""What an audit is asked for, checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError

DEFAULT_CREDIT = ("grpo", "hapo", "surprisal", "attention", "success_trie")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """Settings of one audit.

    * `model`: a folder or a name on the hub; None only for the records of a run.
    * `task`: a lab task or `gym:NAME,…`. `source`: a run's folder or a JSONL of responses, in place of a task.
    * `prompts`, `samples`: prompts, and responses per prompt. `max_tokens` bounds a response.
    * `schedule`: the share of training done and the optimiser step that schedules see, `(progress, step)`.
    * `teacher`: a `teacher:` section; None takes the model itself, shown the answer, for methods that need one.
    * `threshold`: a response is correct above this reward.
    """

    credit: tuple[str, ...] = DEFAULT_CREDIT
    model: str | None = None
    task: str | None = None
    source: Path | None = None
    prompts: int = 8
    samples: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    rows_per_pass: int = 8
    schedule: tuple[float, int] = (0.0, 0)
    teacher: Mapping[str, Any] | None = None
    collectors: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if (self.task is None) == (self.source is None):
            raise TokenCreditError(
                "an audit needs a task or a file of responses",
                hint="`--task gym:chain_sum` with `--model`, or a run's folder, or a JSONL of responses",
            )
        if self.task is not None and self.model is None:
            raise TokenCreditError("an audit of a task needs `--model`", hint="a folder, or a name on the hub")
        if not self.credit:
            raise TokenCreditError("an audit needs at least one method", hint="`--credit grpo hapo`")
        for name, least in (("prompts", 1), ("samples", 2), ("max_tokens", 1), ("rows_per_pass", 1)):
            if getattr(self, name) < least:
                raise TokenCreditError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise TokenCreditError(f"`temperature` must be above 0, got {self.temperature}")
