"""The one door: build a pipeline, hand it a batch, get advantages."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.loading import load_attribute
from tokencredit.methods import estimators, presets, transforms
from tokencredit.methods.spec import SCOPES, MethodSpec, Scope, resolve
from tokencredit.records import TokenBatch, with_a_column
from tokencredit.tiles import stretches

TILE = 1 << 18  # tokens at a time; a float64 temporary of them takes 2 MiB


@dataclass(frozen=True, slots=True)
class Step:
    """One function of a pipeline with all its hyperparameters."""

    name: str
    spec: MethodSpec
    hyperparameters: Mapping[str, Any]

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
class Pipeline:
    """A weighted sum of chains `estimator → transform → …`; immutable.

    Build it with `get_pipeline`, `Pipeline.parse` or `Pipeline.of`; combine with `0.5 * a + 0.5 * b`.
    """

    chains: tuple[Chain, ...]
    name: str = "custom"

    @classmethod
    def parse(cls, config: Any) -> "Pipeline":
        """A pipeline from what a YAML config holds.

        * a name or an expression of names: `hapo`, `0.5 * grpo + 0.5 * opd`
        * a list of steps: `[group_normalized, {entropy_capacity: {alpha: 0.3}}]`; `module:function` names your own
        * a weighted sum: `{weighted_sum: [{weight: 0.5, credit: …}, …]}`
        """
        if isinstance(config, Pipeline):
            return config
        if isinstance(config, str):
            return _parse_expression(config)
        if isinstance(config, Mapping) and set(config) == {"weighted_sum"}:
            return _parse_weighted_sum(config["weighted_sum"])
        if isinstance(config, Mapping) and len(config) == 1:  # one preset with its hyperparameters
            (name, given), *_ = config.items()
            return get_pipeline(name, **_hyperparameters(name, given))
        if isinstance(config, Sequence) and len(config) > 0:
            return cls.of(*config)
        raise TokenCreditError(
            f"a credit pipeline is a name, a list of steps or a weighted sum, got {config!r}",
            hint="for example `credit: hapo` or `credit: [group_normalized, {entropy_capacity: {alpha: 0.3}}]`",
        )

    @classmethod
    def of(cls, *steps: Any, name: str = "custom") -> "Pipeline":
        """A pipeline of one chain.

        A step is a name, `{name: hyperparameters}`, a function or `(function, hyperparameters)`.
        """
        first, *rest = steps
        if isinstance(first, str) and first in transforms() and first not in estimators():
            raise TokenCreditError(
                f"a pipeline starts with an estimator, got the transform {first!r}",
                hint="put `group_normalized` in front of it",
            )
        chain = Chain(1.0, _step(first, "estimator"), tuple(_step(item, "transform") for item in rest))
        return cls((chain,), name)

    @property
    def requires(self) -> frozenset[str]:
        """Optional `TokenBatch` fields that the pipeline reads."""
        return frozenset().union(*(step.requires for chain in self.chains for step in chain.active))

    @property
    def scope(self) -> Scope:
        """The largest unit whose tokens act on each other: "token", "response", "group" or "batch"."""
        found = [step.scope for chain in self.chains for step in chain.active if not _is_host_estimator(step)]
        return max(found, key=SCOPES.index, default="token")

    @property
    def draws(self) -> bool:
        """Whether any step needs a generator."""
        return any(step.spec.draws for chain in self.chains for step in chain.active)

    @property
    def is_identity(self) -> bool:
        """Whether the result is the host's own advantages."""
        if len(self.chains) != 1 or self.chains[0].weight != 1.0:
            return False
        chain = self.chains[0]
        return _is_host_estimator(chain.estimator) and len(chain.active) == 1

    def to_config(self) -> Any:
        """The pipeline with every hyperparameter spelled out, as JSON-like data that `Pipeline.parse` reads back."""
        chains = [
            {
                "weight": chain.weight,
                "credit": [{step.name: dict(step.hyperparameters)} for step in (chain.estimator, *chain.transforms)],
            }
            for chain in self.chains
        ]
        alone = len(chains) == 1 and chains[0]["weight"] == 1.0
        return chains[0]["credit"] if alone else {"weighted_sum": chains}

    def then(self, *steps: Any) -> "Pipeline":
        """This pipeline with more transforms at the end of every chain."""
        more = tuple(_step(item, "transform") for item in steps)
        name = " → ".join((self.name, *(step.name for step in more)))
        return Pipeline(tuple(replace(chain, transforms=chain.transforms + more) for chain in self.chains), name)

    def __mul__(self, weight: int | float) -> "Pipeline":
        return Pipeline(
            tuple(replace(chain, weight=chain.weight * weight) for chain in self.chains), f"{weight:g} * {self.name}"
        )

    __rmul__ = __mul__

    def __add__(self, other: "Pipeline") -> "Pipeline":
        return Pipeline(self.chains + other.chains, f"{self.name} + {other.name}")


def get_pipeline(name: str, **overrides: Any) -> Pipeline:
    """A preset, an estimator, or an expression such as `0.5 * grpo + 0.5 * opd`, hyperparameters overridden by name.

    An override goes to the step that accepts it; where several do, say which: `**{"entropy_capacity.alpha": 0.3}`.
    """
    if not overrides:
        return _parse_expression(name)
    steps = [_as_pair(item) for item in _preset(name)]
    for key, value in overrides.items():
        _override(name, steps, key, value)
    return Pipeline.of(*({step: given} for step, given in steps), name=name)


def assign_credit(
    pipeline: Any, batch: TokenBatch, *, generator: torch.Generator | None = None
) -> Float[Tensor, "batch response"]:
    """Advantages of every token: float32, 0 outside the mask, detached.

        A = Σ_chains weight · (transform ∘ … ∘ estimator)(batch)

    `pipeline` is a `Pipeline` or anything `Pipeline.parse` reads. `generator` feeds the methods that draw random
    numbers; they refuse to run without one. Raises `TokenCreditError` where a required field is missing or a step
    returns another shape or a value that is not finite.
    """
    pipeline = Pipeline.parse(pipeline)
    for name in sorted(pipeline.requires):
        batch.require(name)
    if batch.response_mask.shape[1] == 0:  # on one rank perhaps: every process makes the same calls
        return assign_credit(pipeline, with_a_column(batch), generator=generator)[:, :0]
    total = torch.zeros_like(batch.response_mask, dtype=torch.float64)
    with torch.no_grad():
        for chain in pipeline.chains:
            total = total + chain.weight * _run(chain, batch, generator)
    return torch.where(batch.response_mask, total, 0.0).float()


def _run(chain: Chain, batch: TokenBatch, generator: torch.Generator | None) -> Float[Tensor, "batch response"]:
    base = _checked(chain.estimator, _in_tiles(chain.estimator, (batch,), generator, None), batch)
    advantages = base
    for step in chain.active[1:]:
        advantages = _checked(step, _in_tiles(step, (advantages, batch), generator, base), batch)
    return advantages


def _in_tiles(step: Step, inputs: tuple[Any, ...], generator: torch.Generator | None, base: Tensor | None) -> Tensor:
    """`_call`, on some rows at a time where other rows do not act on them: temporaries stay in the cache.

    Every tile finds the generator as the call would: draws are a function of it and of the row's own tokens.
    """
    batch: TokenBatch = inputs[-1]
    tiles = stretches(batch, step.scope, TILE)
    if len(tiles) < 2:
        return _call(step, inputs, generator, base)
    state = None if generator is None else generator.get_state()
    found = []
    for tile in tiles:
        rows_of_tile: dict[str, Any] = {name: value[tile] for name, value in batch.tensors().items()}
        part = replace(batch, **rows_of_tile)
        if generator is not None and state is not None:
            generator.set_state(state)
        own = (*(value[tile] for value in inputs[:-1]), part)
        found.append(_call(step, own, generator, None if base is None else base[tile]))
    return torch.cat(found)


def _call(step: Step, inputs: tuple[Any, ...], generator: torch.Generator | None, base: Tensor | None) -> Tensor:
    supplied: dict[str, Any] = dict(step.hyperparameters)
    if step.spec.draws:
        if generator is None:
            raise TokenCreditError(
                f"{step.name} draws random numbers", hint="pass `generator=torch.Generator().manual_seed(…)`"
            )
        supplied["generator"] = generator
    if step.spec.takes_base:
        supplied["base"] = base
    return step.spec.fn(*inputs, **supplied)


def _checked(step: Step, result: Tensor, batch: TokenBatch) -> Tensor:
    """Gate 2: shapes inside a record are not tied to what a function returns, so compare here."""
    if tuple(result.shape) != tuple(batch.response_mask.shape):
        raise TokenCreditError(f"{step.name} must return {list(batch.response_mask.shape)}, got {list(result.shape)}")
    broken = batch.response_mask & ~torch.isfinite(result)
    if bool(broken.any()):
        row, column = broken.nonzero()[0].tolist()
        raise TokenCreditError(f"{step.name} gave {float(result[row, column])} at row {row}, token {column}")
    return result.double()


def _is_host_estimator(step: Step) -> bool:
    return step.name == "group_normalized"


def _preset(name: str) -> Sequence[Any]:
    if name in presets():
        return presets()[name]
    if name in estimators():
        return [name]
    raise unknown("credit method", name, presets() | estimators().keys())


def _parse_expression(text: str) -> Pipeline:
    """`a`, `0.5 * a + 0.5 * b`, `a + b`."""
    parts = [part.strip() for part in text.split("+")]
    found: Pipeline | None = None
    for part in parts:
        match = re.fullmatch(r"(?:([-\d.eE]+)\s*\*\s*)?([\w:.]+)", part)
        if match is None:
            raise TokenCreditError(
                f"cannot read {part!r} in the credit expression {text!r}", hint="write `0.5 * grpo + 0.5 * opd`"
            )
        weight, name = match.groups()
        pipeline = Pipeline.of(*_preset(name), name=name) if ":" not in name else Pipeline.of(name, name=name)
        pipeline = pipeline if weight is None else _number(weight, text) * pipeline
        found = pipeline if found is None else found + pipeline
    assert found is not None
    return found


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TokenCreditError(f"{text!r} is no finite weight in the credit expression {whole!r}")
    return value


def _parse_weighted_sum(terms: Any) -> Pipeline:
    if not isinstance(terms, Sequence) or len(terms) == 0:
        raise TokenCreditError(f"`weighted_sum` is a list of {{weight, credit}}, got {terms!r}")
    found: Pipeline | None = None
    for term in terms:
        if not isinstance(term, Mapping) or set(term) != {"weight", "credit"}:
            raise TokenCreditError(f"a term of `weighted_sum` has the keys weight and credit, got {term!r}")
        pipeline = _number(str(term["weight"]), "weighted_sum") * Pipeline.parse(term["credit"])
        found = pipeline if found is None else found + pipeline
    assert found is not None
    return found


def _as_pair(item: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(item, str):
        return item, {}
    (name, given), *_ = item.items()
    return name, dict(_hyperparameters(name, given))


def _hyperparameters(name: str, given: Any) -> Mapping[str, Any]:
    """What YAML holds behind the name of a step; nothing there means the defaults."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TokenCreditError(
            f"hyperparameters of {name} are a mapping, got {given!r}", hint=f"write `{name}: {{alpha: 0.3}}`"
        )
    return given


def _override(preset: str, steps: list[tuple[str, dict[str, Any]]], key: str, value: Any) -> None:
    wanted, _, parameter = key.rpartition(".")
    accepting = [(step, given) for step, given in steps if parameter in _spec(step).defaults]
    able = [given for step, given in accepting if wanted in ("", step)]
    if len(able) > 1:
        owners = [step for step, _ in accepting]
        raise TokenCreditError(
            f"{parameter!r} of {preset} is ambiguous", hint=f"write one of {[f'{o}.{parameter}' for o in owners]}"
        )
    if not able:
        accepted = sorted({name for step, _ in steps for name in _spec(step).defaults})
        raise TokenCreditError(f"{preset} has no hyperparameter {key!r}; accepted: {', '.join(accepted) or '(none)'}")
    able[0][parameter] = value


def _spec(step: str) -> MethodSpec:
    """The row of a step of a preset."""
    if ":" in step:
        return _user_function(step)[1]
    return estimators()[step] if step in estimators() else transforms()[step]


def _step(item: Any, kind: str) -> Step:
    given: Any = None
    if isinstance(item, Mapping):
        if len(item) != 1:
            raise TokenCreditError(f"a step is a name or {{name: hyperparameters}}, got {dict(item)!r}")
        (item, given), *_ = item.items()
    elif isinstance(item, tuple):
        item, given = item
    table = estimators() if kind == "estimator" else transforms()
    if callable(item) or (isinstance(item, str) and ":" in item):
        name, spec = _user_function(item)
    elif isinstance(item, str) and item in table:
        name, spec = item, table[item]
    else:
        raise unknown(kind, item, table)
    return Step(name, spec, resolve(name, spec, _hyperparameters(name, given)))


def _user_function(item: str | Callable[..., Tensor]) -> tuple[str, MethodSpec]:
    """A row for a function outside the tables: `fn.requires` and `fn.scope` are read where it has them."""
    fn = load_attribute(item, "the step") if isinstance(item, str) else item
    name = f"{fn.__module__}:{fn.__qualname__}"
    spec = MethodSpec(
        fn=fn, paper="-", requires=frozenset(getattr(fn, "requires", ())), scope=getattr(fn, "scope", "batch")
    )
    return name, spec
