"""Check the first scores of a teacher: whether it repeats itself, is shifted by a token, or ends otherwise."""

import warnings
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.models import is_sharded
from tokencredit.collect.teacher.base import TeacherRequest
from tokencredit.collect.teacher.checks import ProbeReport, end_ids, probe
from tokencredit.collect.teacher.score import score_rows
from tokencredit.errors import TokenCreditError

PROBED = 8  # rows


class StartProbe:
    """Runs `checks.probe` on the first batch that comes with a policy, and never again.

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
        request: TeacherRequest,
        tokenizer: Any,
    ) -> None:
        policy = request.policy
        if self.done or policy is None:
            return
        self.done = True
        if is_sharded(policy):
            return
        few = request.first(PROBED)
        options = {"temperature": few.temperature, "device": next(policy.parameters()).device}
        try:
            student = score_rows(policy, few.prompt_ids, few.response_ids, few.response_mask, **options)
        except TokenCreditError:  # a policy whose head we cannot read can still be taught
            return
        answers = iter((scores[:PROBED], score(few)))
        ends = [] if tokenizer is None else end_ids(tokenizer, policy)
        self.report = probe(lambda: next(answers), few.response_ids, few.response_mask, student, ends=ends)
        for text in self.report.warnings:
            warnings.warn(text, stacklevel=2)
