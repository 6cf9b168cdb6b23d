"""The laws that every method obeys, over every row of the tables: a new row is tested without a change here."""

import json
from dataclasses import replace

import pytest
import torch
from batches import (
    Case,
    all_cases,
    empty_like,
    field_names,
    fill_outside,
    make_batch,
    permuted,
    token_advantages,
    widened,
)
from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS, RUN_FIELDS, TOKEN_FIELDS, TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.methods.spec import SCOPES
from tokencredit.methods.table import presets
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline
from tokencredit.seeds import generator

CASES = all_cases()
ROWS = [case for case in CASES if not case.given]  # the defaults: each law on its own; other choices: laws together
every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_row = pytest.mark.parametrize("case", ROWS, ids=repr)

# Fields that a method may read without declaring them: always present, or with a meaning when absent.
FREE = frozenset(
    {
        "response_ids",
        "response_mask",
        "rewards",
        "group_ids",
        "scored",
        "step_ids",
        "progress",
        "step",
        "host_advantages",
        "reducer",
    }
)
# Sums over other widths and row orders differ in the last bits of a float64.
SUMS = {"rtol": 1e-9, "atol": 1e-10}
BATCH = make_batch()
WIDTH = BATCH.response_mask.shape[1]


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def door(case: Case, batch: TokenBatch, seed: int = 0) -> Tensor:
    return assign_credit(Pipeline.of(*case.steps), batch, generator=generator("tests", "draws", seed))


@every_row
def test_every_hyperparameter_has_a_default(case: Case) -> None:
    for name, default in case.spec.defaults.items():
        assert default is not Ellipsis and not isinstance(default, type), f"{case.name} has no default for {name}"
    assert set(case.spec.domains) <= set(case.spec.defaults), f"{case.name}: a domain of no hyperparameter"


@every_case
def test_credit_is_zero_outside_the_mask(case: Case) -> None:
    outside = ~BATCH.response_mask
    for credit in (case.raw(BATCH), door(case, BATCH)):
        assert credit.shape == outside.shape
        if credit.stride(1) == 0:  # one column spread over all tokens; `assign_credit` cuts it to the mask
            continue
        assert torch.equal(credit[outside], torch.zeros_like(credit[outside]))
        assert bool(torch.isfinite(credit).all())
    assert credit.dtype == torch.float32


@every_row
def test_values_outside_the_mask_change_nothing(case: Case) -> None:
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(WIDTH // 3)
    poisoned = fill_outside(BATCH, poison)
    advantages = token_advantages(BATCH)
    dirty = torch.where(BATCH.response_mask, advantages, poison)
    exact(case.raw(poisoned, dirty, base=dirty * 1.7), case.raw(BATCH, advantages, base=advantages * 1.7))
    exact(door(case, poisoned), door(case, BATCH))


@every_row
def test_extra_padding_changes_nothing(case: Case) -> None:
    wide = widened(BATCH, torch.arange(WIDTH), WIDTH + 5)
    torch.testing.assert_close(case.raw(wide)[:, :WIDTH], case.raw(BATCH), **SUMS)


@every_row
def test_row_order_changes_nothing(case: Case) -> None:
    order = torch.randperm(len(BATCH.rewards), generator=generator("tests", "order"))
    torch.testing.assert_close(case.raw(permuted(BATCH, order)), case.raw(BATCH)[order], **SUMS)


@every_row
def test_group_labels_change_nothing(case: Case) -> None:
    torch.testing.assert_close(case.raw(replace(BATCH, group_ids=91 - 7 * BATCH.group_ids)), case.raw(BATCH), **SUMS)


@every_row
def test_an_inserted_unchosen_token_changes_no_other(case: Case) -> None:
    for seed in range(3):
        columns = torch.randperm(WIDTH + 4, generator=generator("tests", "insert", seed))[:WIDTH].sort().values
        torch.testing.assert_close(case.raw(widened(BATCH, columns, WIDTH + 4))[:, columns], case.raw(BATCH), **SUMS)


@every_case
def test_presentation_changes_nothing(case: Case) -> None:
    """Padding, unchosen tokens, NaN outside the mask, row order and group labels, all changed at once."""
    order = torch.randperm(len(BATCH.rewards), generator=generator("tests", "rows"))
    columns = torch.randperm(WIDTH + 4, generator=generator("tests", "columns"))[:WIDTH].sort().values
    relabelled = replace(BATCH, group_ids=5 - 3 * BATCH.group_ids)
    moved = fill_outside(permuted(widened(relabelled, columns, WIDTH + 6), order), torch.nan)
    torch.testing.assert_close(case.raw(moved)[:, columns], case.raw(BATCH)[order], **SUMS)


@every_row
def test_inputs_stay_and_no_gradient_flows(case: Case) -> None:
    batch = make_batch(host_advantages=case.kind == "estimator")
    names = [name for name, tensor in batch.tensors().items() if tensor.is_floating_point()]
    batch = replace(batch, **{name: getattr(batch, name).requires_grad_() for name in names})
    before = {name: tensor.detach().clone() for name, tensor in batch.tensors().items()}
    advantages = token_advantages(batch).requires_grad_()
    kept = advantages.detach().clone()
    credit = case.raw(batch, advantages, base=advantages * 1.7)
    assert not credit.requires_grad
    assert not door(case, batch).requires_grad
    exact(advantages.detach(), kept)
    for name, tensor in batch.tensors().items():
        exact(tensor.detach(), before[name])


def one_response(batch: TokenBatch) -> TokenBatch:
    return permuted(batch, torch.tensor([0]))


def groups_of_one(batch: TokenBatch) -> TokenBatch:
    return replace(batch, group_ids=torch.arange(len(batch.rewards)))


def constant_rewards(batch: TokenBatch) -> TokenBatch:
    return replace(batch, rewards=torch.full_like(batch.rewards, 0.1))


def constant_fields(batch: TokenBatch) -> TokenBatch:
    return replace(batch, **{name: 0.1 * getattr(batch, name).sign() for name in TOKEN_FIELDS})


def zero_fields(batch: TokenBatch) -> TokenBatch:
    return replace(batch, **{name: torch.zeros_like(getattr(batch, name)) for name in TOKEN_FIELDS})


def no_rows(batch: TokenBatch) -> TokenBatch:
    return permuted(batch, torch.tensor([], dtype=torch.long))


def big_fields(batch: TokenBatch) -> TokenBatch:
    return replace(batch, **{name: 40.0 * getattr(batch, name) for name in TOKEN_FIELDS})


def past_their_bounds(batch: TokenBatch) -> TokenBatch:
    """Every other log-prob a rounding above 0, and every other value of what cannot be negative a rounding below."""
    even = torch.arange(batch.response_mask.shape[1]) % 2 == 0
    changed = {
        name: torch.where(even, 1e-7 if name.endswith("logprobs") else -1e-7, getattr(batch, name))
        for name in TOKEN_FIELDS
    }
    return replace(batch, **changed)


DEGENERATE = [
    degrade(BATCH)
    for degrade in (
        one_response,
        groups_of_one,
        constant_rewards,
        constant_fields,
        zero_fields,
        big_fields,
        past_their_bounds,
        empty_like,
        no_rows,
    )
]


@every_case
def test_degenerate_batches_stay_finite(case: Case) -> None:
    for batch in DEGENERATE:
        assert bool(torch.isfinite(case.raw(batch)).all()), batch


@every_row
def test_degenerate_batches_pass_the_door(case: Case) -> None:
    for batch in DEGENERATE:
        assert bool(torch.isfinite(door(case, batch)).all()), batch


@every_case
def test_requires_is_sufficient(case: Case) -> None:
    required = case.spec.required(case.hyperparameters)
    absent = {name for name in (*OPTIONAL_FIELDS, *RUN_FIELDS, "step_ids", "progress") if name not in required}
    batch = replace(BATCH, **dict.fromkeys(absent))
    assert batch.carried == required
    assert bool(torch.isfinite(case.raw(batch)).all())


@every_case
def test_a_missing_input_is_named_with_its_collector(case: Case) -> None:
    pipeline = Pipeline.of(*case.steps)
    for name in case.spec.required(case.hyperparameters):
        batch = replace(BATCH, **{name: None})
        with pytest.raises(TokenCreditError, match=f"needs `{name}`") as caught:
            case.raw(batch)
        assert caught.value.hint
        if name in pipeline.requires:  # a step at its limit is skipped and needs nothing
            with pytest.raises(TokenCreditError, match=f"needs `{name}`"):
                assign_credit(pipeline, batch, generator=generator("tests"))


class Watched(TokenBatch):
    """A batch that remembers which fields were read."""

    __slots__ = ()
    seen: set[str] = set()  # noqa: RUF012 - a slotted instance holds nothing of its own

    def __getattribute__(self, name: str) -> object:
        if name in field_names():
            Watched.seen.add(name)
        return super().__getattribute__(name)


@every_case
def test_requires_is_exact(case: Case) -> None:
    batch = make_batch(host_advantages=case.kind == "estimator")
    advantages = token_advantages(batch)
    watched = Watched(**{name: getattr(batch, name) for name in field_names()})
    Watched.seen.clear()
    case.raw(watched, advantages, base=advantages * 1.7)
    required = case.spec.required(case.hyperparameters)
    if "host_advantages" not in Watched.seen:  # an estimator that hands on the host's reads nothing else
        assert required <= Watched.seen
    assert Watched.seen - FREE <= required


@every_row
def test_an_unknown_hyperparameter_names_the_accepted(case: Case) -> None:
    wrong = Case(case.kind, case.name, case.spec, {"nonsense": 1})
    with pytest.raises(TokenCreditError, match=f"{case.name} has no hyperparameter 'nonsense'") as caught:
        Pipeline.of(*wrong.steps)
    for name in case.spec.defaults:
        assert name in str(caught.value)


@every_row
def test_declared_limits_hold(case: Case) -> None:
    batch = make_batch(host_advantages=True)
    for limit in case.spec.limits:
        at = Case(case.kind, case.name, case.spec, limit.hyperparameters)
        advantages = torch.where(batch.response_mask, token_advantages(batch), 0.0)
        if limit.equals == "identity":
            torch.testing.assert_close(at.raw(batch, advantages), advantages, rtol=0.0, atol=1e-12)
            uniform = assign_credit("grpo", batch)
            exact(door(at, batch), uniform)
        else:
            other = get_pipeline(limit.equals)
            torch.testing.assert_close(door(at, batch), assign_credit(other, batch), rtol=1e-6, atol=1e-7)


DRAWN = [make_batch(seed=seed, groups=(8, 8, 8), response=30) for seed in range(5)]


@every_row
def test_limits_hold_on_drawn_batches(case: Case) -> None:
    for batch in DRAWN:
        advantages = torch.where(batch.response_mask, token_advantages(batch), 0.0)
        for limit in case.spec.limits:
            if limit.equals == "identity":
                at = Case(case.kind, case.name, case.spec, limit.hyperparameters)
                torch.testing.assert_close(at.raw(batch, advantages), advantages, rtol=0.0, atol=1e-12)


MIXED = [make_batch(seed=seed, groups=(5, 4, 6), response=20) for seed in range(3)]


@pytest.mark.parametrize("case", [case for case in CASES if case.spec.keeps_sign], ids=repr)
def test_sign_is_kept_where_declared(case: Case) -> None:
    for batch in (*MIXED, *map(past_their_bounds, MIXED)):
        advantages = torch.where(batch.response_mask, token_advantages(batch), 0.0)
        credit = case.raw(batch, advantages)
        assert bool((credit * advantages >= 0).all())
        assert bool((credit[advantages == 0] == 0).all())


@pytest.mark.parametrize("case", [case for case in CASES if case.spec.conserves], ids=repr)
def test_what_is_declared_conserved_is_conserved(case: Case) -> None:
    batch = MIXED[1]
    advantages = torch.where(batch.response_mask, token_advantages(batch), 0.0)
    credit = case.raw(batch, advantages)
    if case.spec.conserves == "multiset":
        exact(credit.sort(dim=1).values, advantages.sort(dim=1).values)
        return
    assert case.spec.conserves == "mass"
    wanted = 1.7 * advantages if case.spec.takes_base else advantages
    whole = case.spec.scope_at(case.hyperparameters) == "batch"
    for group in batch.group_ids.unique()[:1] if whole else batch.group_ids.unique():
        rows = torch.ones_like(batch.rewards, dtype=torch.bool) if whole else batch.group_ids == group
        torch.testing.assert_close(credit[rows].abs().sum(), wanted[rows].abs().sum(), **SUMS)


@pytest.mark.parametrize("case", [case for case in ROWS if case.spec.draws], ids=repr)
def test_randomness_comes_from_the_generator_alone(case: Case) -> None:
    batch = make_batch(seed=1, groups=(8, 8, 8), response=30)
    state = torch.random.get_rng_state()
    first = case.raw(batch, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    exact(case.raw(batch, seed=0), first)
    assert not all(torch.equal(case.raw(batch, seed=seed), first) for seed in range(1, 12))
    with pytest.raises(TokenCreditError, match="draws random numbers"):
        assign_credit(Pipeline.of(*case.steps), batch)


SCOPED = [make_batch(seed=seed, groups=(5, 4, 1), response=9) for seed in range(3)]


@every_case
def test_scope_is_honest(case: Case) -> None:
    """Nothing outside the unit that `scope` names changes the credit inside it."""
    scope = case.spec.scope_at(case.hyperparameters)
    assert scope in SCOPES
    batch = SCOPED[0]
    row = int((batch.response_mask.sum(1) * (batch.group_ids == batch.group_ids.mode().values)).argmax())
    column = int(batch.response_mask[row].nonzero()[1])
    own_response = torch.arange(len(batch.rewards))[:, None] == row
    unit = {
        "token": own_response & (torch.arange(9) == column),
        "response": own_response.expand(-1, 9),
        "group": (batch.group_ids == batch.group_ids[row])[:, None].expand(-1, 9),
        "batch": torch.ones_like(batch.response_mask),
    }[scope]
    own_rows = unit.any(1)
    advantages = token_advantages(batch)
    for other in SCOPED[1:]:
        changed = {
            name: torch.where(unit if value.ndim == 2 else own_rows, value, getattr(other, name))
            for name, value in batch.tensors().items()
            if name not in ("group_ids", "response_mask", "step_ids")
        }
        if case.spec.draws and scope == "token":
            changed.pop("response_ids")  # they seed the draws
        outside = torch.where(unit, advantages, token_advantages(other))
        credit = case.raw(replace(batch, **changed), outside, base=outside * 1.7)
        expected = case.raw(batch, advantages, base=advantages * 1.7)
        torch.testing.assert_close(credit[unit], expected[unit], **SUMS)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_parses_round_trips_and_runs(name: str) -> None:
    pipeline = get_pipeline(name)
    config = pipeline.to_config()
    written = json.loads(json.dumps(config))
    again = Pipeline.parse(written)
    assert json.loads(json.dumps(again.to_config())) == written
    assert again.requires == pipeline.requires <= {*OPTIONAL_FIELDS, *RUN_FIELDS}
    batch = BATCH
    credit = assign_credit(pipeline, batch, generator=generator("tests"))
    exact(assign_credit(again, batch, generator=generator("tests")), credit)
    assert bool(torch.isfinite(credit).all()) and bool((credit != 0).any())


def with_rows_that_do_not_count(batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
    """`batch` with more rows between its own, and which rows are its own.

    One was not scored and holds NaN and garbage, one was scored but has no token, one is alone in an unscored group.
    """
    own = len(batch.rewards)
    order = torch.tensor([0, *range(own), own - 1, own - 1])
    extra = torch.zeros(own + 3, dtype=torch.bool)
    extra[[0, -2, -1]] = True
    more = batch.rows(order)
    changed: dict[str, Tensor] = {"scored": ~extra}
    for name, value in more.tensors().items():
        if value.is_floating_point():
            poison = torch.full_like(value, torch.nan)
            changed[name] = torch.where(extra if value.ndim == 1 else extra[:, None], poison, value)
    changed["scored"][-2] = True  # what makes this one not count is that it has no token
    changed["rewards"][-2] = 40.0
    mask = more.response_mask.clone()
    mask[-2], mask[0], mask[-1] = False, True, True
    group_ids = more.group_ids.clone()
    group_ids[-1] = 1_000
    return replace(more, response_mask=mask, group_ids=group_ids, **changed), ~extra


@every_case
def test_a_row_that_does_not_count_changes_no_other_row(case: Case) -> None:
    for batch in (BATCH, make_batch(seed=8, groups=(3, 2, 3), host_advantages=True)):
        more, own = with_rows_that_do_not_count(batch)
        credit = door(case, more)
        exact(credit[own], door(case, batch))
        exact(credit[~own], torch.zeros_like(credit[~own]))


@every_row
def test_without_any_score_there_is_no_credit(case: Case) -> None:
    unscored = torch.zeros(len(BATCH.rewards), dtype=torch.bool)
    for rewards in (BATCH.rewards, torch.full_like(BATCH.rewards, torch.nan)):
        exact(door(case, replace(BATCH, scored=unscored, rewards=rewards)), torch.zeros(BATCH.response_mask.shape))


def counts_rows(batch: TokenBatch) -> Tensor:
    """An estimator of a user who has never heard of `scored`."""
    return (batch.rewards - batch.rewards.mean())[:, None].expand(batch.response_mask.shape) * len(batch.rewards)


def test_a_users_function_never_sees_a_row_that_does_not_count() -> None:
    batch = BATCH.rows(BATCH.counted)
    more, own = with_rows_that_do_not_count(batch)
    credit = assign_credit(Pipeline.of(counts_rows), more)
    exact(credit[own], assign_credit(Pipeline.of(counts_rows), batch))
    assert not credit[~own].any()


def test_the_hosts_advantage_of_an_unscored_row_is_not_handed_on() -> None:
    batch = make_batch(host_advantages=True)
    scored = torch.arange(len(batch.rewards)) != 2
    expected = torch.where(batch.response_mask & scored[:, None], batch.host_advantages[:, None], 0.0)
    exact(assign_credit("grpo", replace(batch, scored=scored)), expected)
