"""Which pipelines a benchmark runs, what they need, and which are left out and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokencredit.batch.records import COLLECTORS, TokenBatch
from tokencredit.bench import signals
from tokencredit.bench.problem import Sampled
from tokencredit.errors import TokenCreditError
from tokencredit.methods.table import CONTROLS, presets
from tokencredit.pipeline.labels import label_of
from tokencredit.pipeline.pipeline import Pipeline

FieldCollector = Callable[[Sampled], Tensor]


# Batch fields that a benchmark can fill besides those that every batch of it carries; add yours by field name.
FIELD_COLLECTORS: dict[str, FieldCollector] = {
    "attention_entropies": signals.entropies,
    "attention_distances": signals.distances,
    "attention_influences": signals.influences,
    "importances": signals.importances,
    "adapter_residuals": signals.residuals,
    "doubling_ratios": signals.doubling,
    "ref_logprobs": signals.reference,
}

CARRIED = frozenset({"old_logprobs", "current_logprobs", "rollout_logprobs", "entropies", "values", "step"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A pipeline under the name that the results show; `matched` says that its credit mass is that of its estimator."""

    name: str
    pipeline: Pipeline
    matched: bool


def entries(
    credits: Sequence[Any], *, controls: bool, collectors: Mapping[str, FieldCollector]
) -> tuple[list[Entry], dict[str, str]]:
    """The pipelines to run, each followed by its mass-matched twin, and the presets left out with the reason.

    `credits` are what `credit:` of a run takes; without any, every preset. Estimators alone have the mass of their
    estimator already, so they have no twin.
    """
    chosen: dict[str, Pipeline] = {}
    for credit in credits or tuple(presets()):
        name = label_of(credit)
        if name in chosen:
            raise TokenCreditError(f"method {name!r} is named twice", hint="name each method once")
        chosen[name] = replace(Pipeline.parse(credit), name=name)
    if controls:
        added = {name: steps for name, steps in CONTROLS.items() if name not in chosen}
        chosen |= {name: replace(Pipeline.of(*steps), name=name) for name, steps in added.items()}
    able = CARRIED | collectors.keys()
    found: list[Entry] = []
    left_out: dict[str, str] = {}
    for name, pipeline in chosen.items():
        missing = sorted(pipeline.requires - able)
        if missing:
            source = COLLECTORS.get(missing[0], "a collector of your own")
            left_out[name] = f"needs `{missing[0]}`, which no collector of the benchmark fills ({source})"
            continue
        found.append(Entry(name=name, pipeline=pipeline, matched=False))
        if any(len(chain.active) > 1 for chain in pipeline.chains):
            found.append(Entry(name=name, pipeline=pipeline.then("match_mass"), matched=True))
    return found, left_out


def fill(sampled: Sampled, names: frozenset[str], collectors: Mapping[str, FieldCollector]) -> TokenBatch:
    """The batch with the fields that `names` ask for."""
    wanted: list[str] = sorted((names - CARRIED) & collectors.keys())
    found: dict[str, Any] = {name: collectors[name](sampled) for name in wanted}
    return replace(sampled.batch, **found)
