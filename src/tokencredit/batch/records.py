"""The records that travel through the package: a batch of sampled responses, and what a pipeline made of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokencredit.batch.checks import FLOATS, INTEGERS, LARGEST, check_tensor, representable, slack
from tokencredit.batch.reduce import LOCAL, Reducer, numbered
from tokencredit.errors import TokenCreditError, shown, unknown

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

# A probability is at most 1, an entropy or a distance at least 0. Rounding may pass that, see `checks.slack`.
NOT_POSITIVE = frozenset(name for name in TOKEN_FIELDS if name.endswith("logprobs"))
NOT_NEGATIVE = frozenset(
    {
        "entropies",
        "teacher_entropies",
        "attention_entropies",
        "attention_distances",
        "attention_influences",
        "adapter_residuals",
    }
)


class _Known:
    """What was found out about a batch: slots, so that they are not fields of it."""

    __slots__ = ("_examined", "_numbered")
    _examined: set[str]  # names of the fields whose values were examined
    _numbered: tuple[Tensor, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TokenBatch(_Known):
    """Sampled responses, padded to one length; every group (same prompt) is complete.

    `response_mask` is True exactly where the policy chose the token; padding and text inserted by an environment are
    False, so a row may have holes. Values outside the mask carry no meaning and may be NaN.

    * `rewards`: outcome, once per response; finite where the response counts (see `counted`).
    * `group_ids`: same prompt, same id. Any integers; a group may lie on several processes if `reducer` spans them.
    * `*_logprobs`, `entropies`: nats, at the sampling temperature. `old_` is the policy before the update, `current_`
      the policy that is being updated.
    * `values`: V of the prefix *before* the token, the probability that the response ends up accepted.
    * `host_advantages`: what the host computed, one number per response; `group_normalized` hands it on.
    * `doubling_ratios`: the adapter residual at twice the LoRA scaling over the residual, one number per response
      (those of one probe share it): 2 where the residual is signal, 1 where it is rounding, NaN where it is 0.
    * `step_ids`: which step of a multi-step response a token belongs to; absent means one step a token.
    * `scored`: False for a response that nothing rewarded (every reward function returned None, or the host rejected
      it). Its values carry no meaning and may be NaN. It takes part in no baseline and gets no credit. Absent: all are
      scored.
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
        """Gate 1: types, shapes, devices and rewards. Values of optional fields are examined where they are read."""
        object.__setattr__(self, "_examined", set())
        check_tensor("response_ids", self.response_ids, INTEGERS)
        if self.response_ids.ndim != 2:
            raise TokenCreditError(
                f"`response_ids` must be [batch, response], got shape {list(self.response_ids.shape)}"
            )
        for name, (dtypes, per_token) in _EXPECTED.items():
            self._check_field(name, dtypes, per_token)
        if not self.rewards.is_cuda:  # there `examine` looks at them, together with everything else
            self._check_rewards()
        self._check_scalars()

    def _check_field(self, name: str, dtypes: tuple[torch.dtype, ...], per_token: bool) -> None:
        value = getattr(self, name)
        if value is None and name not in REQUIRED:
            return
        check_tensor(name, value, dtypes)
        shape = self.response_ids.shape if per_token else self.response_ids.shape[:1]
        if value.shape != shape:
            raise TokenCreditError(f"`{name}` must have shape {list(shape)}, got {list(value.shape)}")
        if value.device != self.response_ids.device:
            raise TokenCreditError(
                f"`{name}` is on {value.device}, but `response_ids` is on {self.response_ids.device}",
                hint="move all tensors of a batch to one device with `.to(device)`",
            )

    def _check_rewards(self) -> None:
        if bool(representable(self.rewards).all()):
            return
        broken = ~representable(self.rewards) & self.counted
        if bool(broken.any()):
            row = int(broken.nonzero()[0])
            raise TokenCreditError(
                f"`rewards` must be finite, got {float(self.rewards[row])} in row {row}",
                hint="mark a response that has no score with `scored`: False takes it out of every baseline",
            )

    def _check_scalars(self) -> None:
        number = isinstance(self.progress, Real) and not isinstance(self.progress, bool)
        if self.progress is not None and not (number and 0.0 <= self.progress <= 1.0):
            raise TokenCreditError(f"`progress` must be in [0, 1], got {shown(self.progress)}")
        whole = isinstance(self.step, Integral) and not isinstance(self.step, bool)
        if self.step is not None and not (whole and 0 <= int(self.step) < 1 << 63):
            raise TokenCreditError(f"`step` must be a whole number of at least 0, got {shown(self.step)}")
        if not isinstance(self.reducer, Reducer):
            raise TokenCreditError(
                f"`reducer` must be a Reducer, got {type(self.reducer).__name__}",
                hint="leave it out on one process; pass `ProcessGroupReducer()` on several",
            )

    def __repr__(self) -> str:
        """Sizes, dtypes, device and carried fields; no values, so that it costs nothing on a GPU."""
        rows, columns = self.response_ids.shape
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in self.tensors().items()}
        tensors = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        scalars = "".join(
            f", {name}={getattr(self, name)}" for name in ("progress", "step") if getattr(self, name) is not None
        )
        return f"TokenBatch({rows} responses × {columns} tokens on {self.response_ids.device}: {tensors}{scalars})"

    @property
    def counted(self) -> Bool[Tensor, " batch"]:
        """Responses that take part: scored, and with at least one chosen token.

        All others get no credit and enter no statistic, under every estimator and transform: `assign_credit` runs the
        pipeline on the counted responses alone.
        """
        if self.response_mask.numel() and self.response_mask.device.type == "cpu":
            filled = self.response_mask.view(torch.uint8).amax(1) > 0  # the same, thirty times faster
        else:
            filled = self.response_mask.any(1)
        return filled if self.scored is None else filled & self.scored

    @property
    def numbered_groups(self) -> tuple[Int[Tensor, " batch"], int]:
        """A number for the group of each row, the same on all processes, and how many there are at most."""
        if not hasattr(self, "_numbered"):
            object.__setattr__(self, "_numbered", numbered(self.group_ids, self.reducer))
        return self._numbered

    def rows(self, index: Any) -> "TokenBatch":
        """Some rows of the batch, by slice, indices or a mask. Values are not checked again.

        The reducer stays: over several processes all must call with it, also those that keep no row.
        """
        return self._changed({name: value[index] for name, value in self.tensors().items()})

    def moved(self, device: torch.device) -> "TokenBatch":
        """The batch on another device."""
        return self._changed({name: value.to(device) for name, value in self.tensors().items()})

    def whole_groups(self, index: Any) -> "TokenBatch":
        """`rows`, whose groups are whole and numbered without a gap, the first the lowest."""
        part = self.rows(index)
        numbers = self.numbered_groups[0][index]
        object.__setattr__(part, "_numbered", (numbers - numbers[0], len(numbers)))
        return part

    def where_counted(self) -> "TokenBatch":
        """The batch with an empty mask where a response does not count."""
        counted = self.counted
        if counted.device.type == "cpu" and bool(counted.all()):
            return self._changed({})
        return self._changed({"response_mask": self.response_mask & counted[:, None]})

    def _changed(self, changes: Mapping[str, Tensor]) -> "TokenBatch":
        """The batch with other tensors, not checked again."""
        part = object.__new__(type(self))
        for name in _FIELDS:
            object.__setattr__(part, name, changes[name] if name in changes else getattr(self, name))
        object.__setattr__(part, "_examined", set(self._names_examined()))
        return part

    def examine(self, names: Iterable[str], *, domains: bool = True) -> bool:
        """Refuse values of optional fields that a method cannot read.

        Values must be finite and within the range of float32 wherever a counted response chose the token. Log-probs
        must not be positive, entropies, distances and residuals not negative; both up to rounding.

        Args:
          names: optional fields; those that the batch does not carry are skipped.
          domains: False looks only for values that are not finite.

        Returns:
          Whether every response counts, from the same copy to the host as the examination.

        Raises:
          TokenCreditError: names the field, the value, its place, and what fills the field.
        """
        names = tuple(names)
        every, *refused = self.look(names, domains=domains).tolist()
        for name, is_refused in zip(("rewards", *names), refused, strict=True):
            if is_refused:
                self._refuse(name, domains)
        self._names_examined().update(names)
        return bool(every)

    def look(self, names: Sequence[str], *, domains: bool = True) -> Bool[Tensor, " flag"]:
        """What `examine` finds, where it lies: whether every response counts; of rewards and fields, which it refuses.

        Nothing is copied to the host, so on a GPU one may look first and ask later.
        """
        counted = self.counted
        flags = [counted.all()]
        for name in ("rewards", *names):
            value = getattr(self, name)
            # A ratio of NaN says that there was nothing to measure. Rewards on the CPU were checked at the start.
            skipped = not isinstance(value, Tensor) or name == "doubling_ratios"
            if skipped or (not value.is_cuda and (name == "rewards" or self._is_plainly_sound(name, domains))):
                flags.append(torch.zeros_like(flags[0]))
            else:
                flags.append(self._broken(name, counted, domains).any())
        return torch.stack(flags)

    def _is_plainly_sound(self, name: str, domains: bool) -> bool:
        """Whether all values of a field, padding too, can be read: one pass, which leaves little to look at."""
        value = getattr(self, name).detach()
        if not value.numel():
            return True
        least, greatest = (float(end) for end in value.aminmax())
        lowest = -slack(value.dtype) if domains and name in NOT_NEGATIVE else -LARGEST
        highest = slack(value.dtype) if domains and name in NOT_POSITIVE else LARGEST
        return lowest <= least and greatest <= highest  # NaN is neither

    def _broken(self, name: str, counted: Bool[Tensor, " batch"], domains: bool) -> Tensor:
        """Where a field holds a value that no method can read; one number per token or per response."""
        value = getattr(self, name).detach()
        good = representable(value)
        if domains and name in NOT_POSITIVE:
            good &= value <= slack(value.dtype)
        if domains and name in NOT_NEGATIVE:
            good &= value >= -slack(value.dtype)
        return (counted if value.ndim == 1 else counted[:, None] & self.response_mask) & ~good

    def trust(self, names: Iterable[str]) -> None:
        """Take the values of these fields as they are, so that `require` returns them even where they are NaN."""
        self._names_examined().update(names)

    def _refuse(self, name: str, domains: bool) -> None:
        """Raise for the first value of a field that cannot be read."""
        if name == "rewards":
            self._check_rewards()
        place = self._broken(name, self.counted, domains).nonzero()[0].tolist()
        value = float(getattr(self, name)[tuple(place)])
        at = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "token"), place, strict=False))
        if not isfinite(value) or abs(value) > LARGEST:
            needed = "finite (within float32) where the mask is True"
        else:
            needed = "at most 0 (up to rounding)" if name in NOT_POSITIVE else "at least 0 (up to rounding)"
        raise TokenCreditError(
            f"`{name}` must be {needed}, got {value} at {at}", hint=f"it comes from: {COLLECTORS[name]}"
        )

    def _names_examined(self) -> set[str]:
        if not hasattr(self, "_examined"):  # a copy, or a batch from another process: only the fields travel
            object.__setattr__(self, "_examined", set())
        return self._examined

    @overload
    def require(self, name: Literal["step"]) -> int: ...

    @overload
    def require(self, name: str) -> Tensor: ...

    def require(self, name: str) -> Tensor | int:
        """The optional field `name`, or an error that says what fills it, or which of its values cannot be read."""
        if name not in (*OPTIONAL_FIELDS, *RUN_FIELDS):
            raise unknown("batch field", name, (*OPTIONAL_FIELDS, *RUN_FIELDS))
        value: Tensor | int | None = getattr(self, name)
        if value is None:
            raise TokenCreditError(
                f"this pipeline needs `{name}`, which this batch does not carry",
                hint=f"it comes from: {COLLECTORS[name]}",
            )
        if isinstance(value, Tensor) and name not in self._names_examined():
            self.examine((name,), domains=False)
        return value

    @property
    def carried(self) -> frozenset[str]:
        """Names of the optional fields that are present."""
        names = (*OPTIONAL_FIELDS, *RUN_FIELDS)
        return frozenset(name for name in names if getattr(self, name) is not None)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are present, by field name."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


_FIELDS = tuple(item.name for item in fields(TokenBatch))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CreditRecord:
    """What the side tap keeps of one step: the batch, the advantages, and how they came about.

    `pipeline` is the resolved configuration (`Pipeline.to_config()`); `tokens` are decoded for display, one list a row,
    one string a column, and never trusted.
    """

    step: int
    pipeline: Any
    batch: TokenBatch
    advantages: Float[Tensor, "batch response"] = field(repr=False)
    tokens: list[list[str]] = field(default_factory=list, repr=False)
    prompts: list[str] = field(default_factory=list, repr=False)


def with_a_column(batch: TokenBatch) -> TokenBatch:
    """A batch without columns, every response empty, with one column of padding."""
    wide: dict[str, Any] = {name: pad(value, (0, 1)) for name, value in batch.tensors().items() if value.ndim > 1}
    return replace(batch, **wide)


REQUIRED = frozenset({"response_mask", "rewards", "group_ids"})

# Of every tensor but `response_ids`: the dtypes it may have, and whether it holds one value per token.
_EXPECTED: Mapping[str, tuple[tuple[torch.dtype, ...], bool]] = {
    "response_mask": ((torch.bool,), True),
    "rewards": (FLOATS, False),
    "group_ids": (INTEGERS, False),
    "scored": ((torch.bool,), False),
    "step_ids": (INTEGERS, True),
    "host_advantages": (FLOATS, False),
    "doubling_ratios": (FLOATS, False),
    **dict.fromkeys(TOKEN_FIELDS, (FLOATS, True)),
}
