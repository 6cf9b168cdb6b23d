"""`assign_credit`: run a pipeline on a batch and check what each step returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.records import TokenBatch, with_a_column
from tokencredit.batch.row_ranges import stretches
from tokencredit.errors import TokenCreditError, shown
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline
from tokencredit.pipeline.steps import Chain, Step

TILE = 1 << 18  # tokens at a time; a float64 temporary of them takes 2 MiB
Finding = tuple[str, Tensor, Tensor]  # a step, its result, and whether a chosen token of it is not finite


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
    reads_host = any(chain.estimator.spec.is_host_baseline for chain in pipeline.chains)
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
