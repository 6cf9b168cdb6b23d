"""What the table says of a method, and the check of hyperparameters against its signature and its row."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from tokencredit.errors import TokenCreditError, shown, unknown

Method = Callable[..., Tensor]
Scope = Literal["token", "response", "group", "batch"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
Endpoints = tuple[float, float]  # a weight at the start and at the end of a schedule, each at least 0

# Arguments that `assign_credit` supplies; they are no hyperparameters.
SUPPLIED = frozenset({"advantages", "batch", "generator", "base"})


@dataclass(frozen=True, slots=True)
class Limit:
    """At these hyperparameters the method equals something simpler; the conformance suite holds it to that.

    `equals` is "identity", or a preset or estimator name.
    """

    hyperparameters: Mapping[str, Any]
    equals: str = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """One row of the table of methods.

    * `requires`: optional batch fields that the method reads; a function of the hyperparameters where they decide.
    * `scope`: the largest unit whose other tokens change the credit of a token; a function of the hyperparameters where
      they decide. Methods of scope "group" or "batch" must see whole groups.
    * `domains`: intervals such as "(0, 1]" of numeric hyperparameters; choices come from `Literal` annotations.
    * `is_host_baseline`: inside a host, the estimator returns the host's own advantages.
    * `in_blocks`: the function bounds its temporaries by itself and is handed the whole batch.
    * `limits`: see `Limit`. `conserves`: "multiset" (per response) or "mass" or None, tested.
    * `renamed`: choices of a hyperparameter that had another name before, so that older configs still read.
    """

    fn: Method
    paper: str
    requires: frozenset[str] | Callable[[Mapping[str, Any]], frozenset[str]] = frozenset()
    scope: Scope | Callable[[Mapping[str, Any]], Scope] = "token"
    domains: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    keeps_sign: bool = False
    is_host_baseline: bool = False
    in_blocks: bool = False
    conserves: str | None = None
    renamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def required(self, hyperparameters: Mapping[str, Any]) -> frozenset[str]:
        """Batch fields read at these hyperparameters."""
        return self.requires if isinstance(self.requires, frozenset) else self.requires(hyperparameters)

    def scope_at(self, hyperparameters: Mapping[str, Any]) -> Scope:
        """The scope at these hyperparameters."""
        return self.scope if isinstance(self.scope, str) else self.scope(hyperparameters)

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults, from the signature: they are declared once."""
        return {name: parameter.default for name, parameter in _hyperparameters(self.fn).items()}

    @property
    def draws(self) -> bool:
        """Whether the method takes a generator."""
        return "generator" in _parameters(self.fn)

    @property
    def takes_base(self) -> bool:
        """Whether the method compares with what the estimator gave."""
        return "base" in _parameters(self.fn)


@lru_cache(maxsize=1024)
def _parameters(fn: Method) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fn).parameters


def _hyperparameters(fn: Method) -> dict[str, inspect.Parameter]:
    found = _parameters(fn)
    return {
        name: parameter
        for name, parameter in found.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SUPPLIED
    }


def resolve(name: str, spec: MethodSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a step, defaults filled in; errors name the value and what is accepted."""
    parameters = _hyperparameters(spec.fn)
    given = {key: _current_name(spec, key, value) for key, value in given.items()}
    for key, value in given.items():
        if key not in parameters:
            raise _no_such_hyperparameter(name, key, parameters)
        _check_choice(name, key, value, parameters[key].annotation)
        _check_domain(name, key, value, spec.domains.get(key))
    resolved = spec.defaults | {key: _as_annotated(value, parameters[key].annotation) for key, value in given.items()}
    missing = [key for key, value in resolved.items() if value is inspect.Parameter.empty]
    if missing:
        raise TokenCreditError(f"{name} needs `{missing[0]}`", hint=f"write `{name}: {{{missing[0]}: …}}`")
    return resolved


def _current_name(spec: MethodSpec, key: str, value: Any) -> Any:
    """Today's name of a choice that was renamed."""
    return spec.renamed.get(key, {}).get(value, value) if isinstance(value, str) else value


def _no_such_hyperparameter(name: str, key: str, parameters: Mapping[str, Any]) -> TokenCreditError:
    accepted = ", ".join(parameters) or "(none)"
    guess = unknown("", key, parameters).message.partition("did you mean ")[2].partition("?")[0]
    nearest = f", did you mean {guess}?" if guess else ";"
    return TokenCreditError(f"{name} has no hyperparameter {shown(key)}{nearest} accepted: {accepted}")


def _check_choice(name: str, key: str, value: object, annotation: object) -> None:
    if get_origin(annotation) is Literal:
        if not _is_one_of(value, get_args(annotation)):
            raise TokenCreditError(f"`{key}` of {name} must be one of {list(get_args(annotation))}, got {shown(value)}")
        return
    if get_origin(annotation) is Sequence and get_origin(get_args(annotation)[0]) is Literal:
        choices = get_args(get_args(annotation)[0])
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not (listed and all(_is_one_of(item, choices) for item in value)):  # type: ignore[attr-defined]
            raise TokenCreditError(f"`{key}` of {name} must be a list out of {list(choices)}, got {shown(value)}")
        return
    if annotation == Endpoints | None:
        if value is not None and not _is_endpoints(value):
            raise TokenCreditError(
                f"`{key}` of {name} must be two numbers of at least 0, at the start and at the end, got {shown(value)}",
                hint=f"for example `{key}: [1.0, 0.0]`",
            )
        return
    whole = annotation in (int, int | None)
    optional = annotation in (float | None, int | None)
    if (whole or annotation in (float, float | None)) and not (
        _is_number(value, whole) or (optional and value is None)
    ):
        raise TokenCreditError(f"`{key}` of {name} must be a {'whole ' if whole else ''}number, got {shown(value)}")
    if annotation is bool and not isinstance(value, bool):
        raise TokenCreditError(f"`{key}` of {name} must be true or false, got {shown(value)}")


def _is_one_of(value: object, choices: Sequence[object]) -> bool:
    # The type first: an array compares with a text element by element.
    return any(isinstance(value, type(choice)) and value == choice for choice in choices)


def _is_number(value: object, whole: bool) -> bool:
    """A number that a float can hold and that is not NaN; bools are none."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return value == value and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def _is_endpoints(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != len(get_args(Endpoints)):
        return False
    return all(_is_number(item, whole=False) and 0.0 <= item <= sys.float_info.max for item in value)


def _as_annotated(value: Any, annotation: object) -> Any:
    """A whole number where a float is meant becomes one: YAML reads `alpha: 1` as an int."""
    if annotation == Endpoints | None and value is not None:
        return tuple(float(item) for item in value)
    return float(value) if annotation in (float, float | None) and value is not None else value


def _check_domain(name: str, key: str, value: Any, domain: str | None) -> None:
    if domain is None or value is None:
        return
    low, high = (float(bound) for bound in domain[1:-1].split(","))
    above = value > low if domain[0] == "(" else value >= low
    below = value < high if domain[-1] == ")" else value <= high
    if not (above and below):
        raise TokenCreditError(f"`{key}` of {name} must be in {domain}, got {value}")
