"""The text and YAML forms of a pipeline: names, expressions, lists of steps and weighted sums."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.methods.spec import MethodSpec
from tokencredit.methods.table import ALIASES, HOST_ESTIMATOR, estimators, find_preset, presets, transforms
from tokencredit.pipeline.steps import (
    Chain,
    WeightedSum,
    as_weight,
    hyperparameters_of,
    make_step,
    named_step,
    user_function,
)

Pair = tuple[str, dict[str, Any]]  # a step's name and the hyperparameters written with it


def parse_config(config: Any) -> WeightedSum:
    """The chains that a config stands for; `Pipeline.parse` lists the forms."""
    if isinstance(config, WeightedSum):
        return config
    if isinstance(config, str):
        return parse_expression(config)
    if isinstance(config, Mapping) and len(config) == 1:
        name, given = named_step(config)
        if name == "weighted_sum" or not isinstance(name, str):
            return _parse_start(config)
        return parse_name(name, hyperparameters_of(name, given))
    if isinstance(config, Sequence) and not isinstance(config, bytes | bytearray | memoryview) and len(config) > 0:
        return parse_steps(config)
    raise TokenCreditError(
        f"a credit pipeline is a name, a list of steps or a weighted sum, got {shown(config)}",
        hint="for example `credit: hapo` or `credit: [group_normalized, {entropy_capacity: {alpha: 0.3}}]`",
    )


def parse_steps(steps: Sequence[Any], name: str = "custom") -> WeightedSum:
    """The chains of several steps, the first of which is an estimator, a preset or a whole pipeline."""
    if not steps:
        raise TokenCreditError("a pipeline has at least one step", hint=f"start it with `{HOST_ESTIMATOR}`")
    first, *transforms_after = steps
    return replace(_parse_start(first).then(*transforms_after), name=name)


def parse_name(name: str, overrides: Mapping[str, Any]) -> WeightedSum:
    """A preset, an estimator or an expression, with hyperparameters overridden by name."""
    if not overrides:
        return parse_expression(name)
    steps = [_as_pair(item) for item in _steps_of(name)]
    for key, value in overrides.items():
        _override(name, steps, key, value)
    return parse_steps([{step: given} for step, given in steps], name)


def parse_expression(text: str) -> WeightedSum:
    """`a`, `0.5 * a + 0.5 * b`, `a + b`."""
    terms = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:([-\d.eE]+)\s*\*\s*)?([\w:./~-]+)", part.strip())
        if match is None:
            raise TokenCreditError(
                f"cannot read {shown(part.strip())} in the credit expression {shown(text)}",
                hint="write `0.5 * grpo + 0.5 * opd`",
            )
        weight, name = match.groups()
        term = parse_steps(_steps_of(name), name)
        terms.append(term if weight is None else term * as_weight(weight, f"the credit expression {shown(text)}"))
    return _add(terms)


def _parse_start(item: Any) -> WeightedSum:
    """The chains that the first step of a list stands for: an estimator, a preset, or a sum of them."""
    if isinstance(item, WeightedSum):
        return item
    first, given = named_step(item)
    if isinstance(item, Mapping) and first == "weighted_sum":
        return _parse_weighted_sum(given)
    if isinstance(first, str) and first not in estimators():
        if find_preset(first) is not None:
            return parse_name(first, hyperparameters_of(first, given))
        if first in transforms():
            raise _lacks_estimator(first)
        if given is None and any(sign in first for sign in "*+"):
            return parse_expression(first)
    step = make_step(item, "estimator")
    return WeightedSum((Chain(1.0, step),), step.name)


def _parse_weighted_sum(terms: Any) -> WeightedSum:
    if not isinstance(terms, Sequence) or isinstance(terms, str | bytes) or len(terms) == 0:
        raise TokenCreditError(f"`weighted_sum` is a list of {{weight, credit}}, got {shown(terms)}")
    for term in terms:
        if not isinstance(term, Mapping) or set(term) != {"weight", "credit"}:
            raise TokenCreditError(f"a term of `weighted_sum` has the keys weight and credit, got {shown(term)}")
    return _add([parse_config(term["credit"]) * as_weight(term["weight"], "`weighted_sum`") for term in terms])


def _add(terms: Sequence[WeightedSum]) -> WeightedSum:
    chains = tuple(chain for term in terms for chain in term.chains)
    return WeightedSum(chains, " + ".join(term.name for term in terms))


def _steps_of(name: str) -> Sequence[Any]:
    """The steps of a preset or an estimator."""
    steps = find_preset(name)
    if steps is not None:
        return steps
    if name in estimators() or ":" in name:
        return [name]
    if name in transforms():
        raise _lacks_estimator(name)
    raise unknown("credit method", name, presets().keys() | ALIASES.keys() | estimators().keys())


def _lacks_estimator(name: str) -> TokenCreditError:
    return TokenCreditError(
        f"a pipeline starts with an estimator, got the transform {name!r}",
        hint=f"start it with `{HOST_ESTIMATOR}`: `[{HOST_ESTIMATOR}, {name}]`",
    )


def _as_pair(item: Any) -> Pair:
    name, given = named_step(item)
    return name, dict(hyperparameters_of(name, given))


def _override(preset: str, steps: list[Pair], key: str, value: Any) -> None:
    """Set a hyperparameter of the one step of a preset that has it; `step.key` says which where several do."""
    step_name, _, parameter = key.rpartition(".")
    accepting = [(step, given) for step, given in steps if _spec_of(step).accepts(parameter)]
    targets = [(step, given) for step, given in accepting if step_name in ("", step)]
    if len(targets) > 1:
        choices = [f"{step}.{parameter}" for step, _ in accepting]
        raise TokenCreditError(f"{parameter!r} of {preset} is ambiguous", hint=f"write one of {choices}")
    if not targets:
        accepted = sorted({name for step, _ in steps for name in _spec_of(step).defaults})
        raise TokenCreditError(
            f"{preset} has no hyperparameter {shown(key)}; accepted: {', '.join(accepted) or '(none)'}"
        )
    ((step, given),) = targets
    current = _spec_of(step).current_name
    for name in [name for name in given if current(name) == current(parameter)]:
        del given[name]
    given[parameter] = value


def _spec_of(step: str) -> MethodSpec:
    """The row of a step of a preset."""
    if ":" in step:
        return user_function(step)[1]
    return estimators()[step] if step in estimators() else transforms()[step]
