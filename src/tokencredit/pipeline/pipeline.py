"""`Pipeline`: what a method of credit is, from a name, a config or functions."""

from dataclasses import dataclass
from typing import Any

from tokencredit.errors import TokenCreditError, shown
from tokencredit.methods.spec import SCOPES, Scope
from tokencredit.pipeline.parse import parse_config, parse_name, parse_steps
from tokencredit.pipeline.steps import WeightedSum


@dataclass(frozen=True, slots=True)
class Pipeline(WeightedSum):
    """A weighted sum of chains `estimator → transform → …`; immutable.

    Build it with `get_pipeline`, `Pipeline.parse` or `Pipeline.of`; combine with `0.5 * a + 0.5 * b`; `a.then(…)` adds
    transforms.
    """

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
            return cls._from_sum(parse_config(config))
        except RecursionError as error:
            raise TokenCreditError("the credit pipeline is nested too deeply") from error

    @classmethod
    def of(cls, *steps: Any, name: str = "custom") -> "Pipeline":
        """A pipeline of several steps, the first of which is an estimator, a preset or another pipeline.

        A step is a name, `{name: hyperparameters}`, a function or `(function, hyperparameters)`.
        """
        return cls._from_sum(parse_steps(steps, name))

    @classmethod
    def _from_sum(cls, weighted: WeightedSum) -> "Pipeline":
        return weighted if isinstance(weighted, cls) else cls(weighted.chains, weighted.name)

    @property
    def requires(self) -> frozenset[str]:
        """Optional `TokenBatch` fields that the pipeline reads."""
        return frozenset().union(*(step.requires for chain in self.chains for step in chain.active))

    @property
    def scope(self) -> Scope:
        """The largest unit whose tokens act on each other: "token", "response", "group" or "batch"."""
        steps = [step for chain in self.chains for step in chain.active if not step.spec.is_host_baseline]
        return max((step.scope for step in steps), key=SCOPES.index, default="token")

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
        return chain.estimator.spec.is_host_baseline and len(chain.active) == 1

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


def get_pipeline(name: str, /, **overrides: Any) -> Pipeline:
    """A preset, an estimator, or an expression such as `0.5 * grpo + 0.5 * opd`, hyperparameters overridden by name.

    An override goes to the step that accepts it; where several do, say which: `**{"entropy_capacity.alpha": 0.3}`.
    """
    if not isinstance(name, str):
        raise TokenCreditError(f"a credit method is a name, got {shown(name)}")
    return Pipeline._from_sum(parse_name(name, overrides))
