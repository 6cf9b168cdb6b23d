"""The records that travel through the package: a batch of sampled responses, and what a pipeline made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.reduce import LOCAL, Reducer

# What fills each optional field, named in the error when it is missing.
COLLECTORS: Mapping[str, str] = {
    "old_logprobs": "log-probs of the policy that sampled, from the host's scoring pass or `collect.logprobs`",
    "current_logprobs": "log-probs of the policy being updated: `CreditGRPOTrainer(timing='update')`",
    "rollout_logprobs": "log-probs that the rollout engine reported",
    "ref_logprobs": "the host's KL reference pass (`beta > 0` in TRL), or `collect.adapter` without the adapter",
    "teacher_logprobs": "a teacher from `collect.teacher` (the `teacher:` section of a config)",
    "teacher_entropies": "a local teacher (`kind: model`, `self` or `base`); a server gives sampled tokens alone",
    "entropies": "the host's scoring pass (`CreditGRPOTrainer` does it) or `collect.logprobs`",
    "attention_entropies": "`collect.attention`",
    "attention_distances": "`collect.attention_maps`: how far back local heads look",
    "attention_influences": "`collect.attention_maps`: how much later tokens look back at a token",
    "adapter_residuals": "`collect.adapter` (a PEFT LoRA model)",
    "doubling_ratios": "`collect.adapter.doubling_ratio` (a PEFT LoRA model)",
    "values": "`collect.exact` on enumerable tasks, `collect.monte_carlo` elsewhere",
    "importances": "`collect.answer`, or your own: how much each token matters for the final answer",
    "host_advantages": "the host's own advantages; only an adapter sets them",
    "step": "the host, which counts its optimiser steps; in a loop of your own `TokenBatch(step=…)`, 0 at the first",
}

TOKEN_FIELDS = (
    "old_logprobs",
    "current_logprobs",
    "rollout_logprobs",
    "ref_logprobs",
    "teacher_logprobs",
    "teacher_entropies",
    "entropies",
    "attention_entropies",
    "attention_distances",
    "attention_influences",
    "adapter_residuals",
    "values",
    "importances",
)
OPTIONAL_FIELDS = (*TOKEN_FIELDS, "host_advantages", "doubling_ratios")
RUN_FIELDS = ("step",)  # numbers of the run, not of its tokens; a pipeline may require them as well


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """Sampled responses, padded to one length; every group (same prompt) is complete.

    `response_mask` is True exactly where the policy chose the token; padding and text inserted by an environment are
    False, so a row may have holes. Values outside the mask carry no meaning and may be NaN.

    * `rewards`: outcome, once per response; finite.
    * `group_ids`: same prompt, same id. Any integers; a group may lie on several processes if `reducer` spans them.
    * `*_logprobs`, `entropies`: nats, at the sampling temperature. `old_` is the policy before the update, `current_`
      the policy that is being updated.
    * `values`: V of the prefix *before* the token, the probability that the response ends up accepted.
    * `host_advantages`: what the host computed, one number per response; `group_normalized` hands it on.
    * `doubling_ratios`: the adapter residual at twice the LoRA scaling over the residual, one number per response
      (those of one probe share it): 2 where the residual is signal, 1 where it is rounding.
    * `step_ids`: which step of a multi-step response a token belongs to; absent means one step a token.
    * `scored`: False for a response that nothing rewarded (every reward function returned None, or the host rejected
      it). Its reward carries no meaning. It takes part in no baseline and gets no credit. Absent: all are scored.
    * `progress`: share of training done, in [0, 1], for schedules.
    * `step`: optimiser steps done, for schedules that the papers give in steps.
    """

    response_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    rewards: Float[Tensor, " batch"]
    group_ids: Int[Tensor, " batch"]
    old_logprobs: Float[Tensor, "batch response"] | None = None
    current_logprobs: Float[Tensor, "batch response"] | None = None
    rollout_logprobs: Float[Tensor, "batch response"] | None = None
    ref_logprobs: Float[Tensor, "batch response"] | None = None
    teacher_logprobs: Float[Tensor, "batch response"] | None = None
    teacher_entropies: Float[Tensor, "batch response"] | None = None
    entropies: Float[Tensor, "batch response"] | None = None
    attention_entropies: Float[Tensor, "batch response"] | None = None
    attention_distances: Float[Tensor, "batch response"] | None = None
    attention_influences: Float[Tensor, "batch response"] | None = None
    adapter_residuals: Float[Tensor, "batch response"] | None = None
    values: Float[Tensor, "batch response"] | None = None
    importances: Float[Tensor, "batch response"] | None = None
    host_advantages: Float[Tensor, " batch"] | None = None
    doubling_ratios: Float[Tensor, " batch"] | None = None
    step_ids: Int[Tensor, "batch response"] | None = None
    scored: Bool[Tensor, " batch"] | None = None
    progress: float | None = None
    step: int | None = None
    reducer: Reducer = field(default=LOCAL, repr=False)

    def __post_init__(self) -> None:
        if self.response_ids.ndim != 2:
            raise TokenCreditError(
                f"`response_ids` must be [batch, response], got shape {list(self.response_ids.shape)}"
            )
        batch, response = self.response_ids.shape
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("response_mask", "step_ids", *TOKEN_FIELDS), (batch, response)
        )
        for name in ("rewards", "group_ids", "host_advantages", "doubling_ratios", "scored"):
            expected[name] = (batch,)
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise TokenCreditError(f"`{name}` must have shape {list(shape)}, got {list(value.shape)}")
        if self.response_mask.dtype != torch.bool:
            raise TokenCreditError(f"`response_mask` must be bool, got {self.response_mask.dtype}")
        if not bool(torch.isfinite(self.rewards).all()):
            row = int((~torch.isfinite(self.rewards)).nonzero()[0])
            raise TokenCreditError(
                f"`rewards` must be finite, got {float(self.rewards[row])} in row {row}",
                hint="give an unscored response a number (0.0), or drop its whole group",
            )
        if self.progress is not None and not 0.0 <= self.progress <= 1.0:
            raise TokenCreditError(f"`progress` must be in [0, 1], got {self.progress}")
        for name in TOKEN_FIELDS:
            self._check_finite(name)

    def _check_finite(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        broken = self.response_mask & ~torch.isfinite(value)
        if bool(broken.any()):
            row, column = broken.nonzero()[0].tolist()
            raise TokenCreditError(
                f"`{name}` must be finite where the mask is True, got {float(value[row, column])} at row {row}, "
                f"token {column}",
                hint=f"it comes from: {COLLECTORS[name]}",
            )

    @overload
    def require(self, name: Literal["step"]) -> int: ...

    @overload
    def require(self, name: str) -> Tensor: ...

    def require(self, name: str) -> Tensor | int:
        """The optional field `name`, or an error that says what fills it."""
        if name not in (*OPTIONAL_FIELDS, *RUN_FIELDS):
            raise unknown("batch field", name, (*OPTIONAL_FIELDS, *RUN_FIELDS))
        value: Tensor | int | None = getattr(self, name)
        if value is None:
            raise TokenCreditError(
                f"this pipeline needs `{name}`, which this batch does not carry",
                hint=f"it comes from: {COLLECTORS[name]}",
            )
        return value

    @property
    def carried(self) -> frozenset[str]:
        """Names of the optional fields that are present."""
        names = (*OPTIONAL_FIELDS, *RUN_FIELDS)
        return frozenset(name for name in names if getattr(self, name) is not None)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are present, by field name."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CreditRecord:
    """What the side tap keeps of one step: the batch, the advantages, and how they came about.

    `pipeline` is the resolved configuration (`Pipeline.to_config()`); `tokens` are decoded for display, one list a row,
    one string a column, and never trusted.
    """

    step: int
    pipeline: Any
    batch: TokenBatch
    advantages: Float[Tensor, "batch response"]
    tokens: list[list[str]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def with_a_column(batch: TokenBatch) -> TokenBatch:
    """A batch without columns, every response empty, with one column of padding."""
    wide: dict[str, Any] = {name: pad(value, (0, 1)) for name, value in batch.tensors().items() if value.ndim > 1}
    return replace(batch, **wide)
