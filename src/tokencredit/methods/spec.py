"""The row of a method, the rows of a file, and the check of hyperparameters against signature and row."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
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


def at(**hyperparameters: Any) -> Limit:
    """The limit where a method is the identity."""
    return Limit(hyperparameters)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One row of the table of methods.

    * `requires`: optional batch fields that the method reads; a function of the hyperparameters where they decide.
    * `scope`: the largest unit whose other tokens change the credit of a token; a function of the hyperparameters where
      they decide. Methods of scope "group" or "batch" must see whole groups.
    * `domains`: intervals such as "(0, 1]" of numeric hyperparameters; choices come from `Literal` annotations.
    * `limits`: see `Limit`. `keeps_sign`, `conserves` ("multiset" per response, "mass" or None): laws that are tested.
    * `is_host_baseline`: inside a host, the estimator returns the host's own advantages.
    * `in_blocks`: the function bounds its temporaries by itself and is handed the whole batch.
    * `is_exact`: the estimator is the exact credit that benchmarks compare with.
    * `ignores_reward`: the estimator learns from a teacher only; rewards are logged and nothing else.
    * `report_section`: where the report shows runs with this method: "bonus" for a teacher's bonus on top of the
      estimator's credit, "signals" for weights in proportion to a signal of each token.
    * `renamed`: old name to new name of a hyperparameter, or new name to {old choice: new choice}, so that older
      configs still read.
    """

    fn: Method
    paper: str
    _: KW_ONLY
    requires: frozenset[str] | Callable[[Mapping[str, Any]], frozenset[str]] = frozenset()
    scope: Scope | Callable[[Mapping[str, Any]], Scope] = "token"
    domains: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    keeps_sign: bool = False
    conserves: str | None = None
    is_host_baseline: bool = False
    in_blocks: bool = False
    is_exact: bool = False
    ignores_reward: bool = False
    report_section: Literal["bonus", "signals"] | None = None
    renamed: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)

    def required(self, hyperparameters: Mapping[str, Any]) -> frozenset[str]:
        """Batch fields read at these hyperparameters."""
        return self.requires if isinstance(self.requires, frozenset) else self.requires(hyperparameters)

    def scope_at(self, hyperparameters: Mapping[str, Any]) -> Scope:
        """The scope at these hyperparameters."""
        return self.scope if isinstance(self.scope, str) else self.scope(hyperparameters)

    def current_name(self, key: str) -> str:
        """The name of a hyperparameter today."""
        name = self.renamed.get(key, key)
        return name if isinstance(name, str) else key

    def accepts(self, key: str) -> bool:
        """Whether the method has this hyperparameter, under today's name or an older one."""
        return self.current_name(key) in self.defaults

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults, from the signature: they are declared once."""
        return {name: parameter.default for name, parameter in _hyperparameters(self.fn).items()}

    @property
    def is_estimator(self) -> bool:
        """Whether the method starts a pipeline: it takes the batch, and no advantages."""
        return "advantages" not in inspect.signature(self.fn).parameters

    @property
    def draws(self) -> bool:
        """Whether the method takes a generator."""
        return "generator" in _parameters(self.fn)

    @property
    def takes_base(self) -> bool:
        """Whether the method compares with what the estimator gave."""
        return "base" in _parameters(self.fn)


@dataclass(frozen=True, slots=True)
class Alias:
    """Another published name of a preset, and how the papers differ."""

    of: str
    differs: str


class Rows:
    """What one file of methods adds to the tables: its `ROWS`. A method has the name of its function.

    `controls` are pipelines that the benchmark runs beside the presets: a method with its credit shuffled, reversed or
    averaged.
    """

    def __init__(
        self,
        *methods: MethodSpec,
        presets: Mapping[str, list[Any]] | None = None,
        aliases: Mapping[str, Alias] | None = None,
        controls: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self.methods = methods
        self.estimators = {spec.fn.__name__: spec for spec in methods if spec.is_estimator}
        self.transforms = {spec.fn.__name__: spec for spec in methods if not spec.is_estimator}
        self.presets, self.aliases, self.controls = presets or {}, aliases or {}, controls or {}


@lru_cache(maxsize=1024)
def _parameters(fn: Method) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fn).parameters


def _hyperparameters(fn: Method) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in _parameters(fn).items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SUPPLIED
    }


def resolve(name: str, spec: MethodSpec, written: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a step, defaults filled in; errors name the value and what is accepted."""
    parameters = _hyperparameters(spec.fn)
    resolved = spec.defaults
    for key, value in _with_current_names(name, spec, written).items():
        if key not in parameters:
            raise _no_such_hyperparameter(name, key, parameters)
        _check_choice(name, key, value, parameters[key].annotation)
        _check_domain(name, key, value, spec.domains.get(key))
        resolved[key] = _as_annotated(value, parameters[key].annotation)
    missing = [key for key, value in resolved.items() if value is inspect.Parameter.empty]
    if missing:
        raise TokenCreditError(f"{name} needs `{missing[0]}`", hint=f"write `{name}: {{{missing[0]}: …}}`")
    return resolved


def _with_current_names(name: str, spec: MethodSpec, written: Mapping[str, Any]) -> dict[str, Any]:
    """Today's names of hyperparameters and of their choices."""
    current: dict[str, Any] = {}
    for key, value in written.items():
        new = spec.current_name(key)
        if new in current:
            raise TokenCreditError(f"{name} has `{new}` twice: {shown(key)} is its old name", hint="leave out one")
        choices = spec.renamed.get(new, {})
        renames = isinstance(value, str) and not isinstance(choices, str)
        current[new] = choices.get(value, value) if renames else value  # type: ignore[union-attr]
    return current


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
