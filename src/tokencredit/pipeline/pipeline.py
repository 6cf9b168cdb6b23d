"""The one door: build a pipeline, hand it a batch, get advantages."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.records import TokenBatch, with_a_column
from tokencredit.batch.row_ranges import stretches
from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.methods.spec import SCOPES, Scope
from tokencredit.methods.table import estimators, presets, transforms
from tokencredit.pipeline.steps import Chain, Step, as_pair, hyperparameters_of, make_step, named_step, override

TILE = 1 << 18  # tokens at a time; a float64 temporary of them takes 2 MiB
Finding = tuple[str, Tensor, Tensor]  # a step, its result, and whether a chosen token of it is not finite


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
        * a preset with more steps: `[hapo, shuffle_within_response]`, `[{hapo: {alpha: 0.5}}, my_module:my_transform]`
        * a weighted sum: `{weighted_sum: [{weight: 0.5, credit: …}, …]}`

        Raises:
          TokenCreditError: for everything else, whatever object it is.
        """
        try:
            return _parse(config)
        except RecursionError as error:
            raise TokenCreditError("the credit pipeline is nested too deeply") from error

    @classmethod
    def of(cls, *steps: Any, name: str = "custom") -> "Pipeline":
        """A pipeline of several steps, the first of which is an estimator, a preset or another pipeline.

        A step is a name, `{name: hyperparameters}`, a function or `(function, hyperparameters)`.
        """
        if not steps:
            raise TokenCreditError("a pipeline has at least one step", hint="start it with `group_normalized`")
        first, *rest = steps
        return replace(_start(first).then(*rest), name=name)

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
        more = tuple(make_step(item, "transform") for item in steps)
        name = " → ".join((self.name, *(step.name for step in more)))
        return Pipeline(tuple(replace(chain, transforms=chain.transforms + more) for chain in self.chains), name)

    def __mul__(self, weight: int | float) -> "Pipeline":
        factor = _weight(weight, "a pipeline is multiplied by a number")
        chains = tuple(
            replace(chain, weight=_weight(chain.weight * factor, f"{factor:g} * {self.name}")) for chain in self.chains
        )
        return Pipeline(chains, f"{factor:g} * {self.name}")

    __rmul__ = __mul__

    def __add__(self, other: "Pipeline") -> "Pipeline":
        if not isinstance(other, Pipeline):
            return NotImplemented
        return _sum((self, other))


def get_pipeline(name: str, /, **overrides: Any) -> Pipeline:
    """A preset, an estimator, or an expression such as `0.5 * grpo + 0.5 * opd`, hyperparameters overridden by name.

    An override goes to the step that accepts it; where several do, say which: `**{"entropy_capacity.alpha": 0.3}`.
    """
    if not isinstance(name, str):
        raise TokenCreditError(f"a credit method is a name, got {shown(name)}")
    if not overrides:
        return _parse_expression(name)
    steps = [as_pair(item) for item in _preset(name)]
    for key, value in overrides.items():
        override(name, steps, key, value)
    return Pipeline.of(*({step: given} for step, given in steps), name=name)


def assign_credit(
    pipeline: Any, batch: TokenBatch, *, generator: torch.Generator | None = None, **hyperparameters: Any
) -> Float[Tensor, "batch response"]:
    """Compute the advantage of every token.

        A = Σ_chains weight · (transform ∘ … ∘ estimator)(batch)

    Responses without a score, and responses without a chosen token, get 0 and act on nothing: the pipeline sees the
    batch without them. This holds for your own functions too.

    Args:
      pipeline: a `Pipeline`, or anything that `Pipeline.parse` reads.
      batch: the sampled responses.
      generator: feeds methods that draw random numbers; they refuse to run without one.
      hyperparameters: overrides for a pipeline given by name, `assign_credit("hapo", batch, alpha=0.3)`.

    Returns:
      Advantages `[batch, response]`: float32, finite, detached, 0 outside the mask.

    Raises:
      TokenCreditError: a required field is missing or holds a value that cannot be read, or a step returns another
        shape or a value that is not finite.
    """
    if hyperparameters:
        pipeline = _with_hyperparameters(pipeline, hyperparameters)
    pipeline = Pipeline.parse(pipeline)
    _check_inputs(batch, generator)
    if not _counts_whole(pipeline, batch):
        counted = batch.counted.nonzero()[:, 0]
        credit = assign_credit(pipeline, batch.rows(counted), generator=generator)
        blank = credit.new_zeros(batch.response_mask.shape)
        return blank.index_copy_(0, counted, credit)
    if batch.response_mask.shape[1] == 0:  # on one rank perhaps: every process makes the same calls
        return assign_credit(pipeline, with_a_column(batch), generator=generator)[:, :0]
    findings: list[Finding] = []
    total = torch.zeros_like(batch.response_mask, dtype=torch.float64)
    with torch.no_grad():
        for chain in pipeline.chains:
            total = total + chain.weight * _run(chain, batch, generator, findings)
        credit = torch.where(batch.response_mask, total, 0.0).float()
        findings.append(_look(pipeline.name, credit, batch))
    _refuse_broken(findings, batch.response_mask)
    return credit


def _with_hyperparameters(pipeline: Any, given: Mapping[str, Any]) -> Pipeline:
    if not isinstance(pipeline, str):
        raise TokenCreditError(
            f"hyperparameters {', '.join(given)} can only be given with a method's name, got {shown(pipeline)}",
            hint="write them into the step: `{hapo: {alpha: 0.3}}`",
        )
    return get_pipeline(pipeline, **given)


def _check_inputs(batch: object, generator: object) -> None:
    if not isinstance(batch, TokenBatch):
        hint = "TokenBatch(**fields) makes one of a mapping" if isinstance(batch, Mapping) else None
        raise TokenCreditError(f"the batch must be a TokenBatch, got {type(batch).__name__}", hint=hint)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TokenCreditError(
            f"`generator` must be a torch.Generator, got {type(generator).__name__}",
            hint="pass `torch.Generator().manual_seed(…)`",
        )


def _counts_whole(pipeline: Pipeline, batch: TokenBatch) -> bool:
    """Whether every response counts; refuses fields that the pipeline reads and the batch lacks or holds wrongly."""
    requires = sorted(pipeline.requires)
    for name in requires:
        if getattr(batch, name, None) is None:
            batch.require(name)  # which says what fills it
    reads_host = any(_is_host_estimator(chain.estimator) for chain in pipeline.chains)
    return batch.examine((*requires, *(("host_advantages",) if reads_host else ())))


def _run(
    chain: Chain, batch: TokenBatch, generator: torch.Generator | None, findings: list[Finding]
) -> Float[Tensor, "batch response"]:
    base = _checked(chain.estimator, _in_tiles(chain.estimator, (batch,), generator, None), batch)
    findings.append(_look(chain.estimator.name, base, batch))
    advantages = base
    for step in chain.active[1:]:
        advantages = _checked(step, _in_tiles(step, (advantages, batch), generator, base), batch)
        findings.append(_look(step.name, advantages, batch))
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
        if generator is not None and state is not None:
            generator.set_state(state)
        own = (*(value[tile] for value in inputs[:-1]), batch.rows(tile))
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


def _checked(step: Step, result: object, batch: TokenBatch) -> Tensor:
    """Gate 2: shapes inside a record are not tied to what a function returns, so compare here."""
    if not isinstance(result, Tensor):
        raise TokenCreditError(f"{step.name} must return a tensor, got {type(result).__name__}")
    if result.shape != batch.response_mask.shape:
        raise TokenCreditError(f"{step.name} must return {list(batch.response_mask.shape)}, got {list(result.shape)}")
    if result.is_complex() or result.device != batch.response_mask.device:
        raise TokenCreditError(
            f"{step.name} must return real numbers on {batch.response_mask.device}, got {result.dtype} on "
            f"{result.device}"
        )
    return result.double()


def _look(name: str, result: Tensor, batch: TokenBatch) -> Finding:
    return name, result, (batch.response_mask & ~(result.abs() < torch.inf)).any()


def _refuse_broken(findings: Sequence[Finding], mask: Tensor) -> None:
    """Raise for the first step that gave a number that is not finite; one copy to the host for all steps."""
    flags = torch.stack([flag for _, _, flag in findings]).tolist()
    for (name, result, _), is_broken in zip(findings, flags, strict=True):
        if is_broken:
            row, column = (mask & ~torch.isfinite(result)).nonzero()[0].tolist()
            raise TokenCreditError(
                f"{name} gave {float(result[row, column])} at row {row}, token {column}",
                hint="credit is float32, at most 3.4e38: look at rewards, weights and hyperparameters of this size",
            )


def _is_host_estimator(step: Step) -> bool:
    return step.name == "group_normalized"


def _preset(name: str) -> Sequence[Any]:
    if name in presets():
        return presets()[name]
    if name in estimators() or ":" in name:
        return [name]
    if name in transforms():
        raise _no_estimator(name)
    raise unknown("credit method", name, presets() | estimators().keys())


def _no_estimator(name: str) -> TokenCreditError:
    return TokenCreditError(
        f"a pipeline starts with an estimator, got the transform {name!r}",
        hint=f"start it with `group_normalized`: `[group_normalized, {name}]`",
    )


def _parse(config: Any) -> Pipeline:
    if isinstance(config, Pipeline):
        return config
    if isinstance(config, str):
        return _parse_expression(config)
    if isinstance(config, Mapping) and len(config) == 1:
        name, given = named_step(config)
        if name == "weighted_sum" or not isinstance(name, str):
            return _start(config)
        return get_pipeline(name, **hyperparameters_of(name, given))
    if isinstance(config, Sequence) and not isinstance(config, bytes | bytearray | memoryview) and len(config) > 0:
        return Pipeline.of(*config)
    raise TokenCreditError(
        f"a credit pipeline is a name, a list of steps or a weighted sum, got {shown(config)}",
        hint="for example `credit: hapo` or `credit: [group_normalized, {entropy_capacity: {alpha: 0.3}}]`",
    )


def _start(item: Any) -> Pipeline:
    """The pipeline that the first step of a list stands for: an estimator, a preset, or a sum of them."""
    if isinstance(item, Pipeline):
        return item
    first, given = named_step(item)
    if isinstance(item, Mapping) and first == "weighted_sum":
        return _parse_weighted_sum(given)
    if isinstance(first, str) and first not in estimators():
        if first in presets():
            return get_pipeline(first, **hyperparameters_of(first, given))
        if first in transforms():
            raise _no_estimator(first)
        if given is None and any(sign in first for sign in "*+"):
            return _parse_expression(first)
    step = make_step(item, "estimator")
    return Pipeline((Chain(1.0, step),), step.name)


def _parse_expression(text: str) -> Pipeline:
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
        pipeline = Pipeline.of(*_preset(name), name=name)
        terms.append(pipeline if weight is None else _weight(weight, f"the credit expression {shown(text)}") * pipeline)
    return _sum(terms)


def _weight(value: object, where: str) -> float:
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


def _sum(terms: Sequence[Pipeline]) -> Pipeline:
    chains = tuple(chain for term in terms for chain in term.chains)
    return Pipeline(chains, " + ".join(term.name for term in terms))


def _parse_weighted_sum(terms: Any) -> Pipeline:
    if not isinstance(terms, Sequence) or isinstance(terms, str | bytes) or len(terms) == 0:
        raise TokenCreditError(f"`weighted_sum` is a list of {{weight, credit}}, got {shown(terms)}")
    for term in terms:
        if not isinstance(term, Mapping) or set(term) != {"weight", "credit"}:
            raise TokenCreditError(f"a term of `weighted_sum` has the keys weight and credit, got {shown(term)}")
    return _sum([_weight(term["weight"], "`weighted_sum`") * _parse(term["credit"]) for term in terms])
