"""What a verl run says about credit: the group `+credit` (or `+tokencredit`) at the top of its Hydra config."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokencredit.collect.table import fields_of, resolve_options
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline

SECTIONS = ("credit", "tokencredit")
TIMINGS = ("auto", "rollout", "update")
TEACHERS = ("distillation", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditSettings:
    """The keys below `+credit`.

    * `method`: a preset, an expression, a list of steps, `{weighted_sum: …}`; `args`: hyperparameters of a preset.
    * `timing`: "rollout" assigns credit once for each sampled batch, on the driver; "update" in the actor's loss, from
      the policy that is being updated; "auto" takes "update" only for methods that need that policy.
    * `teacher`: which of verl's workers `teacher_logprobs` come from.
    * `records`: a folder for `CreditRecord`s, one every `record_every` steps. `seed`: of methods that draw.
    * `collectors`: options of `attention_entropies` and `adapter_residuals`, as in the `collectors:` section of a run.
    """

    method: Any
    args: Mapping[str, Any]
    timing: str = "auto"
    teacher: str = "distillation"
    records: str | None = None
    record_every: int = 1
    seed: int = 0
    collectors: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timing not in TIMINGS:
            raise unknown("credit.timing", self.timing, TIMINGS)
        if self.teacher not in TEACHERS:
            raise unknown("credit.teacher", self.teacher, TEACHERS)
        if self.records is not None and not isinstance(self.records, str):
            raise TokenCreditError(f"`credit.records` must be a folder, got {self.records!r}")
        if isinstance(self.record_every, bool) or not isinstance(self.record_every, int) or self.record_every < 1:
            raise TokenCreditError(f"`credit.record_every` must be a whole number from 1, got {self.record_every!r}")
        self.options()

    def options(self) -> dict[str, dict[str, Any]]:
        """Options of the signals that the workers take, defaults filled in."""
        tapped = fields_of(verl="tapped")
        for name, given in self.collectors.items():
            if name not in tapped:
                raise unknown("credit.collectors entry", name, sorted(tapped))
            if not isinstance(given, Mapping):
                raise TokenCreditError(
                    f"`credit.collectors.{name}` holds options in verl, got {given!r}",
                    hint="a function in a collector's place works with TRL alone",
                )
        return resolve_options(self.collectors)[0]

    def pipeline(self) -> Pipeline:
        """The pipeline that `method` and `args` describe."""
        if not self.args:
            return Pipeline.parse(self.method)
        if not isinstance(self.method, str):
            raise TokenCreditError(
                "`credit.args` belongs to a method given by name",
                hint="write hyperparameters into the list: +credit.method=[group_normalized,{top_entropy:{keep:0.3}}]",
            )
        return get_pipeline(self.method, **self.args)


def section_of(config: DictConfig) -> Any:
    """The group as plain data, None when the run says nothing about credit."""
    present = [name for name in SECTIONS if OmegaConf.select(config, name) is not None]
    if len(present) > 1:
        raise TokenCreditError(
            "both `credit` and `tokencredit` are in the config, which is the same group twice",
            hint="keep `+credit.…`",
        )
    if not present:
        return None
    value = OmegaConf.select(config, present[0])
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def read_settings(config: DictConfig) -> CreditSettings:
    """The settings of a run; `+credit=hapo` and `+credit=[…]` are short for `+credit.method=…`."""
    found = section_of(config)
    if found is None:
        raise TokenCreditError("the trainer is tokencredit's, but no credit method is given", hint="add +credit=hapo")
    if not isinstance(found, Mapping):
        found = {"method": found}
    accepted = [item.name for item in fields(CreditSettings)]
    for key in found:
        if key not in accepted:
            raise unknown("credit option", key, accepted)
    if "method" not in found:
        raise TokenCreditError(f"`credit.method` is missing; given: {', '.join(found)}", hint="add +credit.method=hapo")
    args = found.get("args") or {}
    if not isinstance(args, Mapping):
        raise TokenCreditError(f"`credit.args` is a mapping, got {args!r}", hint="write +credit.args.alpha=0.3")
    return CreditSettings(**dict(found) | {"args": _flattened(args)})


def _flattened(args: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Hydra reads `args.entropy_capacity.alpha` as nested groups; `get_pipeline` wants the dotted name."""
    flat: dict[str, Any] = {}
    for key, value in args.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
