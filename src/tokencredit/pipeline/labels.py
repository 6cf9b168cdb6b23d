"""Names of credit pipelines for tables, plots and folders, and what a report shows of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.methods.table import estimators, find_preset, transforms
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.pipeline.steps import Step


def label_of(credit: Any) -> str:
    """Name a credit as a config writes it: a preset by its name, a pipeline by its steps and the settings they change.

    For example `hapo`, `hapo(alpha=0.5)`, `group_normalized → attention_schedule(direction=high_to_low)` and
    `hapo → my_methods:late`. Hyperparameters at their default are left out, and so is a weight of 1.
    """
    if isinstance(credit, str):
        return credit
    if isinstance(credit, Mapping) and len(credit) == 1 and "weighted_sum" not in credit:
        (name, given), *_ = credit.items()
        return _with_settings(str(name), given if isinstance(given, Mapping) else {})
    head = _preset_at_start(credit)
    if head is None:
        return " + ".join(_label_of_chain(chain.weight, chain) for chain in Pipeline.parse(credit).chains)
    (whole,), (start,) = Pipeline.parse(credit).chains, Pipeline.parse(head).chains
    behind = whole.transforms[len(start.transforms) :]
    return " → ".join((label_of(head), *(_label_of_step(step) for step in behind)))


def step_names(config: Any) -> list[str]:
    """The names of the steps of a pipeline as `Pipeline.to_config` writes it, chain by chain."""
    if isinstance(config, str):
        return [config]
    if isinstance(config, Mapping):
        return step_names(config["weighted_sum"] if "weighted_sum" in config else config.get("credit", [*config]))
    return [name for part in config or () for name in step_names(part)]


def reports_in(section: str, config: Any) -> bool:
    """Whether a step of a stored pipeline belongs in a section of the report (`MethodSpec.report_section`)."""
    specs = {**estimators(), **transforms()}
    return any(name in specs and specs[name].report_section == section for name in step_names(config))


def _preset_at_start(credit: Any) -> Any:
    """The first item of a list of steps where it names a preset, else None."""
    if isinstance(credit, str) or not isinstance(credit, Sequence) or not credit:
        return None
    first = credit[0]
    name = next(iter(first)) if isinstance(first, Mapping) and len(first) == 1 else first
    is_preset = isinstance(name, str) and find_preset(name) is not None and name not in estimators()
    return first if is_preset else None


def _label_of_chain(weight: float, chain: Any) -> str:
    label = " → ".join(_label_of_step(step) for step in (chain.estimator, *chain.transforms))
    return label if weight == 1 else f"{weight:g} ({label})"


def _label_of_step(step: Step) -> str:
    return _with_settings(step.name, {step.written.get(key, key): value for key, value in step.changed.items()})


def _with_settings(name: str, given: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})" if given else name
