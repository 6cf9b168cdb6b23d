"""`assign_credit`: run a pipeline on a batch and check what each step returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import by_blocks, kept
from tokencredit.batch.records import TokenBatch, with_a_column
from tokencredit.batch.reduce import LocalReducer
from tokencredit.batch.row_ranges import row_ranges
from tokencredit.errors import TokenCreditError, shown
from tokencredit.methods.spec import SCOPES, Scope
from tokencredit.methods.table import TRANSFORMS
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline
from tokencredit.pipeline.steps import Chain, Step

Finding = tuple[str, Tensor]  # a step and its result
Looks = list[Tensor]  # a number each, which is finite if what was looked at is


def assign_credit(
    pipeline: Any, batch: TokenBatch, *, generator: torch.Generator | None = None, **hyperparameters: Any
) -> Float[Tensor, "batch response"]:
    """Compute the advantage of every token.

        A = Σ_chains weight · (transform ∘ … ∘ estimator)(batch)

    Responses without a score, and responses without a chosen token, get 0 and act on nothing: the pipeline sees the
    batch without them. This holds for your own functions too.

    Fields keep their dtype, sums are float64, and the result is rounded once. On one device the same batch gives the
    same bits; on CUDA, where sums over a group are atomic, only under `torch.use_deterministic_algorithms(True)`. On
    CUDA the host waits once, at the end, for everything that is checked.

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
    device = batch.response_mask.device
    if device.type == "mps":  # no float64 there
        on_cpu = batch.moved(torch.device("cpu"))
        return assign_credit(pipeline, on_cpu, generator=generator).to(device)
    if batch.response_mask.shape[1] == 0:  # on one rank perhaps: every process makes the same calls
        return assign_credit(pipeline, with_a_column(batch), generator=generator)[:, :0]
    fields, alone = _fields_read(pipeline, batch), isinstance(batch.reducer, LocalReducer)
    if device.type == "cuda" and alone:
        return _with_one_look(pipeline, batch, fields, generator)
    if not batch.examine(fields):
        return _on_counted_rows(pipeline, batch, generator)
    if alone:
        return _quickly(pipeline, batch, generator)
    # Every rank makes the same calls: nothing is computed twice, and nothing is known from an earlier call.
    return _step_by_step(pipeline, batch.rows(slice(None)), generator)


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


def _fields_read(pipeline: Pipeline, batch: TokenBatch) -> tuple[str, ...]:
    """The fields that the pipeline reads; refuses those that the batch lacks."""
    requires = sorted(pipeline.requires)
    for name in requires:
        if getattr(batch, name, None) is None:
            batch.require(name)  # which says what fills it
    reads_host = any(chain.estimator.spec.is_host_baseline for chain in pipeline.chains)
    return (*requires, *(("host_advantages",) if reads_host else ()))


def _on_counted_rows(
    pipeline: Pipeline, batch: TokenBatch, generator: torch.Generator | None
) -> Float[Tensor, "batch response"]:
    counted = batch.counted.nonzero()[:, 0]
    credit = assign_credit(pipeline, batch.rows(counted), generator=generator)
    return credit.new_zeros(batch.response_mask.shape).index_copy_(0, counted, credit)


def _with_one_look(
    pipeline: Pipeline, batch: TokenBatch, fields: Sequence[str], generator: torch.Generator | None
) -> Float[Tensor, "batch response"]:
    """Compute as if every response counted and every value were sound, and ask the device once whether it is so."""
    state = None if generator is None else generator.get_state()
    trusted = batch.rows(slice(None))
    trusted.trust(fields)
    try:
        credit, is_sound = _compute(pipeline, trusted, generator)
        every, *refused, sound = torch.cat((batch.look(fields), is_sound[None])).tolist()
    except Exception:
        if batch.examine(fields):  # the fault is not in the values
            raise
        every, refused, sound = False, [], True
    if generator is not None and state is not None and not (every and sound):
        generator.set_state(state)
    if any(refused) or not every:
        batch.examine(fields)
        return _on_counted_rows(pipeline, batch, generator)
    return credit if sound else _step_by_step(pipeline, batch, generator)


def _quickly(
    pipeline: Pipeline, batch: TokenBatch, generator: torch.Generator | None
) -> Float[Tensor, "batch response"]:
    state = None if generator is None else generator.get_state()
    credit, is_sound = _compute(pipeline, batch, generator)
    if bool(is_sound):
        return credit
    if generator is not None and state is not None:
        generator.set_state(state)
    return _step_by_step(pipeline, batch, generator)


def _compute(
    pipeline: Pipeline, batch: TokenBatch, generator: torch.Generator | None
) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, ""]]:
    """Credit, some rows at a time where other rows do not act on them, and whether all of it is surely finite.

    Every tile finds the generator as the whole would: draws are a function of it and of the row's own tokens.
    """
    looks: Looks = []
    in_blocks = all(step.spec.in_blocks for chain in pipeline.chains for step in chain.active)
    tiles = [] if in_blocks else row_ranges(batch, _scope(pipeline, batch))
    with torch.no_grad():
        if len(tiles) < 2:
            credit = _masked_sum(pipeline, batch, generator, looks)
        else:
            credit = torch.empty(batch.response_mask.shape, dtype=torch.float32)
            state = None if generator is None else generator.get_state()
            for tile in tiles:
                if generator is not None and state is not None:
                    generator.set_state(state)
                credit[tile] = _masked_sum(pipeline, batch.whole_groups(tile), generator, looks)
    return credit, torch.stack(looks).isfinite().all()


def _scope(pipeline: Pipeline, batch: TokenBatch) -> Scope:
    """The largest unit of rows that act on each other. What the host computed acts on nothing."""
    steps = [step for chain in pipeline.chains for step in chain.active]
    if batch.host_advantages is not None:
        steps = [step for step in steps if not step.spec.is_host_baseline]
    return max((step.scope for step in steps), key=SCOPES.index, default="token")


def _masked_sum(
    pipeline: Pipeline, batch: TokenBatch, generator: torch.Generator | None, looks: Looks
) -> Float[Tensor, "batch response"]:
    """The weighted sum of the chains, 0 outside the mask, rounded to float32; what is finite in it is noted."""
    total: Any = None
    for chain in pipeline.chains:
        result = _run(chain, batch, generator, looks)
        if chain.weight != 1.0 or len(pipeline.chains) > 1:
            result = chain.weight * result.double()
        total = result if total is None else total + result
    last, column = pipeline.chains[0].active[-1], _column_of(total)
    if len(pipeline.chains) == 1 and last.spec.in_blocks and last.name in TRANSFORMS:  # those are 0 there
        credit = total.float()
    elif column.shape != total.shape:
        credit = kept(column.float(), batch.response_mask)
    else:
        credit = by_blocks(lambda x: x.float(), batch.response_mask, total)
    looks.append((column.float() if column.shape != total.shape else credit).sum().double())
    return credit


def _column_of(x: Float[Tensor, "batch response"]) -> Float[Tensor, "batch #response"]:
    """One column where it is spread over all."""
    return x[:, :1] if x.shape[1] > 1 and x.stride(1) == 0 else x


def _run(chain: Chain, batch: TokenBatch, generator: torch.Generator | None, looks: Looks) -> Tensor:
    """What the last step of a chain returns."""
    base = advantages = _checked(chain.estimator, _call(chain.estimator, (batch,), generator, None), batch)
    for step in chain.active[1:]:
        looks.append(_column_of(advantages).sum().double())
        advantages = _checked(step, _call(step, (advantages, batch), generator, base), batch)
    return advantages


def _step_by_step(
    pipeline: Pipeline, batch: TokenBatch, generator: torch.Generator | None
) -> Float[Tensor, "batch response"]:
    """The credit, or an error that names the first step which gave a number that is not finite.

    It looks at each number; a sum of large ones need not be finite.
    """
    findings: list[Finding] = []
    total = torch.zeros_like(batch.response_mask, dtype=torch.float64)
    with torch.no_grad():
        for chain in pipeline.chains:
            base = advantages = _checked(chain.estimator, _call(chain.estimator, (batch,), generator, None), batch)
            findings.append((chain.estimator.name, base))
            for step in chain.active[1:]:
                advantages = _checked(step, _call(step, (advantages, batch), generator, base), batch)
                findings.append((step.name, advantages))
            total = total + chain.weight * advantages.double()
        credit = kept(total, batch.response_mask).float()
    _refuse_broken([*findings, (pipeline.name, credit)], batch.response_mask)
    return credit


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
    return result if result.dtype in (torch.float32, torch.float64) else result.double()


def _refuse_broken(findings: Sequence[Finding], mask: Tensor) -> None:
    """Raise for the first step that gave a number that is not finite; one copy to the host for all steps."""
    flags = torch.stack([(mask & ~torch.isfinite(result)).any() for _, result in findings]).tolist()
    for (name, result), is_broken in zip(findings, flags, strict=True):
        if is_broken:
            row, column = (mask & ~torch.isfinite(result)).nonzero()[0].tolist()
            raise TokenCreditError(
                f"{name} gave {float(result[row, column])} at row {row}, token {column}",
                hint="credit is float32, at most 3.4e38: look at rewards, weights and hyperparameters of this size",
            )
