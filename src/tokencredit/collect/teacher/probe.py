"""Check the first scores of a teacher: whether it repeats itself, is shifted by a token, or ends otherwise."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.models import is_sharded
from tokencredit.collect.teacher.checks import ProbeReport, end_ids, probe
from tokencredit.collect.teacher.score import score_rows
from tokencredit.errors import TokenCreditError

PROBED = 8  # rows


class Batch(NamedTuple):
    """What a teacher is asked: prompts of the student, responses, and the rows of the data."""

    prompt_ids: list[list[int]]
    response_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    rows: list[Mapping[str, Any]]

    def first(self, count: int) -> "Batch":
        return Batch(self.prompt_ids[:count], self.response_ids[:count], self.response_mask[:count], self.rows[:count])


class StartProbe:
    """Runs `teacher_checks.probe` on the first batch that comes with a policy, and never again.

    It costs one more scoring of eight rows and one pass of the policy over them. Teachers call it from `score`, so that
    hosts need not. What it finds is in `report`; warnings are given, and a teacher that cannot be right is refused.
    """

    def __init__(self) -> None:
        self.done = False
        self.report: ProbeReport | None = None

    def __call__(
        self,
        score: Callable[..., Float[Tensor, "batch response"]],
        scores: Float[Tensor, "batch response"],
        batch: Batch,
        temperature: float,
        policy: Any,
        tokenizer: Any,
    ) -> None:
        if self.done or policy is None:
            return
        self.done = True
        if is_sharded(policy):
            return
        few = batch.first(PROBED)
        try:
            student = score_rows(
                policy,
                few.prompt_ids,
                few.response_ids,
                few.response_mask,
                temperature=temperature,
                batch_size=PROBED,
                device=next(policy.parameters()).device,
            )
        except TokenCreditError:  # a policy whose head we cannot read can still be taught
            return
        answers = iter((scores[:PROBED], score(*few, temperature)))
        ends = [] if tokenizer is None else end_ids(tokenizer, policy)
        self.report = probe(lambda: next(answers), few.response_ids, few.response_mask, student, ends=ends)
        for text in self.report.warnings:
            warnings.warn(text, stacklevel=2)
