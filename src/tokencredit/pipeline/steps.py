"""The parts of a pipeline: steps with their hyperparameters, chains of steps and weighted sums of chains."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS
from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.methods.spec import SCOPES, MethodSpec, Scope, resolve
from tokencredit.methods.table import ALIASES, HOST_ESTIMATOR, estimators, find_preset, presets, transforms
from tokencredit.pipeline.plugins import load_function

Sum = TypeVar("Sum", bound="WeightedSum")  # a `Pipeline` stays one
CALLS = {"estimator": ("batch",), "transform": ("advantages", "batch")}
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Step:
    """One function of a pipeline with all its hyperparameters.

    `written` maps the name of a hyperparameter to the older name that a config gave it; labels show that one.
    """

    name: str
    spec: MethodSpec
    hyperparameters: Mapping[str, Any]
    written: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def is_identity(self) -> bool:
        """Whether the row declares that these hyperparameters change nothing."""
        return any(
            limit.equals == "identity"
            and all(self.hyperparameters[key] == value for key, value in limit.hyperparameters.items())
            for limit in self.spec.limits
        )

    @property
    def changed(self) -> dict[str, Any]:
        """The hyperparameters that are not at their defaults."""
        defaults = self.spec.defaults
        return {key: value for key, value in self.hyperparameters.items() if value != defaults[key]}

    @property
    def requires(self) -> frozenset[str]:
        """Batch fields that this step reads."""
        return frozenset() if self.is_identity else self.spec.required(self.hyperparameters)

    @property
    def scope(self) -> Scope:
        """The largest unit whose other tokens change the credit of a token."""
        return self.spec.scope_at(self.hyperparameters)


@dataclass(frozen=True, slots=True)
class Chain:
    """One estimator, then transforms, times a weight."""

    weight: float
    estimator: Step
    transforms: tuple[Step, ...] = ()

    @property
    def active(self) -> tuple[Step, ...]:
        """The steps that do something."""
        return (self.estimator, *(step for step in self.transforms if not step.is_identity))


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of chains, with the name it is shown under."""

    chains: tuple[Chain, ...]
    name: str = "custom"

    def then(self: Sum, *steps: Any) -> Sum:
        """This sum with more transforms at the end of every chain."""
        more = tuple(make_step(item, "transform") for item in steps)
        chains = tuple(replace(chain, transforms=chain.transforms + more) for chain in self.chains)
        return replace(self, chains=chains, name=" → ".join((self.name, *(step.name for step in more))))

    def __mul__(self: Sum, weight: int | float) -> Sum:
        factor = as_weight(weight, "a pipeline is multiplied by a number")
        product = f"{factor:g} * {self.name}"
        chains = tuple(replace(chain, weight=as_weight(chain.weight * factor, product)) for chain in self.chains)
        return replace(self, chains=chains, name=product)

    __rmul__ = __mul__

    def __add__(self: Sum, other: "WeightedSum") -> Sum:
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return replace(self, chains=self.chains + other.chains, name=f"{self.name} + {other.name}")


def as_weight(value: object, where: str) -> float:
    """A finite weight, from a number or its text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TokenCreditError(f"{shown(value)} is not a finite weight in {where}")
    return number


def make_step(item: Any, kind: str) -> Step:
    """A step from what a config or a caller writes: a name, `{name: hyperparameters}`, a function, or a pair.

    Args:
      item: the step.
      kind: "estimator" for the first step of a chain, "transform" for the others.
    """
    item, given = named_step(item)
    table = estimators() if kind == "estimator" else transforms()
    if isinstance(item, str) and item in table:
        name, spec = item, table[item]
    elif callable(item) or (isinstance(item, str) and ":" in item):
        name, spec = user_function(item, kind)
    else:
        raise _unknown_step(item, kind)
    hyperparameters = hyperparameters_of(name, given)
    older = {spec.current_name(key): key for key in hyperparameters if spec.current_name(key) != key}
    return Step(name, spec, resolve(name, spec, hyperparameters), older)


def named_step(item: Any) -> tuple[Any, Any]:
    """The name or function of a step, and what is written behind it (None where nothing is)."""
    if isinstance(item, Mapping):
        if len(item) != 1:
            raise TokenCreditError(f"a step is a name or {{name: hyperparameters}}, got {shown(dict(item))}")
        (item, given), *_ = item.items()
        return item, given
    if isinstance(item, tuple):
        if len(item) != 2:
            raise TokenCreditError(f"a step is (function, hyperparameters), got {shown(item)}")
        return item
    return item, None


def hyperparameters_of(name: str, given: Any) -> Mapping[str, Any]:
    """What YAML holds behind the name of a step; nothing there means the defaults."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TokenCreditError(
            f"hyperparameters of {name} are a mapping, got {shown(given)}", hint=f"write `{name}: {{alpha: 0.3}}`"
        )
    for key in given:
        if not isinstance(key, str):
            raise TokenCreditError(f"{name} has no hyperparameter {shown(key)}: names are text")
    return given


def user_function(item: Any, kind: str | None = None) -> tuple[str, MethodSpec]:
    """A row for a function outside the tables: `fn.requires` and `fn.scope` are read where it has them.

    Args:
      item: the function, or its `module:name`.
      kind: what it is used as, "estimator" or "transform"; None leaves its arguments unchecked.
    """
    fn: Callable[..., Tensor] = load_function(item, "the step") if isinstance(item, str) else item
    name = item if isinstance(item, str) else _name_function(fn)
    if isinstance(fn, type):
        raise TokenCreditError(f"a step is a function, but {name} is a class", hint="pass a function of the batch")
    _check_arguments(name, fn, kind)
    return name, MethodSpec(fn=fn, paper="-", requires=_requires(name, fn), scope=_scope(name, fn))


def _name_function(fn: Any) -> str:
    """`module:name` of a function, or of the class of a callable object."""
    kind = type(fn)
    return f"{getattr(fn, '__module__', kind.__module__)}:{getattr(fn, '__qualname__', kind.__qualname__)}"


def _check_arguments(name: str, fn: Callable[..., Tensor], kind: str | None) -> None:
    """The function can be called as a step of its kind; refused here, before a batch is sampled."""
    try:
        parameters = tuple(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError) as error:  # some functions of C
        raise TokenCreditError(
            f"cannot read the arguments of {name}, so it cannot be a step", hint="wrap it in a function of your own"
        ) from error
    if kind is None or _can_be_called(parameters, kind):
        return
    if _can_be_called(parameters, "transform" if kind == "estimator" else "estimator"):
        hint = f"put {name} first"
        if kind == "estimator":
            hint = f"start the pipeline with an estimator: `[{HOST_ESTIMATOR}, {name}]`"
    else:
        hint = "hyperparameters of a step are keyword-only: write `*` before them"
    takes = ", ".join(p.name for p in parameters if p.kind in POSITIONAL) or "no positional arguments"
    article = "an" if kind == "estimator" else "a"
    raise TokenCreditError(
        f"{article} {kind} is called as f({', '.join(CALLS[kind])}), but {name} takes ({takes})", hint=hint
    )


def _can_be_called(parameters: Sequence[inspect.Parameter], kind: str) -> bool:
    """Whether a function with these parameters takes the arguments of a step of this kind."""
    positional = [p for p in parameters if p.kind in POSITIONAL]
    least = sum(p.default is p.empty for p in positional)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return least <= len(CALLS[kind]) <= max(least, len(CALLS[kind]) if takes_any else len(positional))


def _requires(name: str, fn: Any) -> frozenset[str]:
    fields = getattr(fn, "requires", ())
    fields = (fields,) if isinstance(fields, str) else fields
    if not isinstance(fields, Iterable):
        raise TokenCreditError(f"`requires` of {name} must be names of batch fields, got {shown(fields)}")
    fields = tuple(fields)
    for required in fields:
        if required not in OPTIONAL_FIELDS:
            raise unknown(f"batch field in `requires` of {name}", required, OPTIONAL_FIELDS)
    return frozenset(fields)


def _scope(name: str, fn: Any) -> Scope:
    scope: Scope = getattr(fn, "scope", "batch")
    if scope not in SCOPES:
        raise TokenCreditError(f"`scope` of {name} must be one of {list(SCOPES)}, got {shown(scope)}")
    return scope


def _unknown_step(item: Any, kind: str) -> TokenCreditError:
    starts = [*estimators(), *presets(), *ALIASES]
    if kind == "transform" and isinstance(item, str) and item in starts:
        steps = " → ".join(str(named_step(step)[0]) for step in find_preset(item) or [item])
        return TokenCreditError(
            f"{item!r} can only start a pipeline, because it begins with an estimator ({steps})",
            hint=f"write it first, or add two pipelines: `0.5 * grpo + 0.5 * {item}`",
        )
    return unknown(kind, item, starts if kind == "estimator" else transforms())
