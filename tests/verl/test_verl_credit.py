"""The trainer's credit step on real rows of the real data store: equals the pure function, and TRL's path."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_path import trl_advantages
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl_setup import as_rows, build_trainer, credit_config, nested, put, rows_of, sampled, store_batch, stored, widths

from tokencredit import assign_credit
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.store import RecordStore
from tokencredit.errors import TokenCreditError

pytestmark = pytest.mark.usefixtures("store")

TOKENIZER = SimpleNamespace(batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows])
METHODS = ["hapo", "gtpo", "forking_tokens", "surprisal", "policy_divergence", "steer", "dr_grpo", "psr", "empg"]


def host_advantages(batch: TokenBatch) -> torch.Tensor:
    """verl's own GRPO, one number a response."""
    scores = torch.zeros(batch.response_mask.shape)
    scores[:, 0] = batch.rewards
    everywhere = torch.ones_like(scores)
    return compute_grpo_outcome_advantage(scores, everywhere, batch.group_ids.numpy())[0][:, 0]


def with_host(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(**batch.tensors() | {"host_advantages": host_advantages(batch)}, progress=batch.progress)


def assert_rows(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_credit_step_equals_the_pure_function_and_trl(method: str) -> None:
    batch = sampled(seed=METHODS.index(method))
    meta = store_batch(batch)
    metrics: dict[str, Any] = {}
    build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, metrics)
    found = stored(meta, "advantages")
    assert_rows(found, as_rows(assign_credit(method, with_host(batch)), batch))
    assert_rows(found, as_rows(trl_advantages(method, with_host(batch)), batch))
    assert metrics["credit/abs_mean"] > 0


@pytest.mark.parametrize("overrides", [["+credit=grpo"], ["+credit.method=forking_tokens", "+credit.args.keep=1.0"]])
def test_an_identity_pipeline_leaves_the_store_as_verl_left_it(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sampled()
    ours, theirs = store_batch(batch, drop=["entropy"]), store_batch(batch, drop=["entropy"])
    trainer = build_trainer(credit_config(*overrides))
    monkeypatch.setattr(trainer, "_assign", None)  # calling it would raise
    trainer._compute_advantage(ours, {})
    build_trainer(credit_config(mode="sync"))._compute_advantage(theirs, {})
    for name in ("advantages", "returns"):
        assert_rows(stored(ours, name), stored(theirs, name), tolerance=0.0)


def test_returns_stay_and_rows_may_come_in_any_order() -> None:
    batch = sampled(seed=3)
    meta, stock = store_batch(batch), store_batch(batch)
    order = torch.randperm(len(meta.keys), generator=torch.Generator().manual_seed(1)).tolist()
    meta.reorder(order)
    build_trainer(credit_config("+credit=hapo"))._compute_advantage(meta, {})
    build_trainer(credit_config(mode="sync"))._compute_advantage(stock, {})
    expected = as_rows(assign_credit("hapo", with_host(batch)), batch)
    assert_rows(stored(meta, "advantages"), [expected[row] for row in order])
    returns = stored(stock, "returns")
    assert_rows(stored(meta, "returns"), [returns[row] for row in order], tolerance=0.0)


def test_verls_padding_rows_change_nothing_and_are_not_recorded(tmp_path: Path) -> None:
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

    batch = sampled(seed=4)
    fields = rows_of(batch)
    lengths = [len(row) + width for row, width in zip(fields["prompts"].unbind(), widths(batch), strict=True)]
    whole = nested(torch.ones(len(lengths), max(lengths), dtype=torch.long), lengths)
    meta = store_batch(batch, input_ids=whole, attention_mask=whole, position_ids=whole, loss_mask=whole)
    bigger = upsample_batch_to_divisible_size(meta, 8, eos_token_id=0)
    assert len(bigger.keys) == 16
    trainer = build_trainer(credit_config("+credit.method=gtpo", f"+credit.records={tmp_path}"))
    trainer.tokenizer = TOKENIZER
    trainer._compute_advantage(bigger, {})
    found = stored(bigger, "advantages")
    assert_rows(found[:10], as_rows(assign_credit("gtpo", with_host(batch)), batch))
    assert all(float(row.abs().sum()) == 0.0 for row in found[10:])
    assert len(RecordStore(tmp_path).read(0).advantages) == 10


def test_tokens_that_verl_rejects_get_no_credit_and_enter_no_statistic() -> None:
    batch = sampled(seed=5)
    meta = store_batch(batch)
    rejection = ("rollout_rs=token_k3", "rollout_rs_threshold=0.5")
    overrides = [f"algorithm.rollout_correction.{value}" for value in rejection]
    build_trainer(credit_config("+credit=hapo", *overrides))._compute_advantage(meta, {})
    kept = torch.zeros_like(batch.response_mask)
    for row, mask in enumerate(stored(meta, "response_mask")):
        kept[row, : len(mask)] = mask.bool()
    assert 0 < int(kept.sum()) < int(batch.response_mask.sum())
    rejected = TokenBatch(**with_host(batch).tensors() | {"response_mask": kept}, progress=batch.progress)
    assert_rows(stored(meta, "advantages"), as_rows(assign_credit("hapo", rejected), batch))


@pytest.mark.parametrize(
    ("drop", "method", "option"),
    [
        ("entropy", "hapo", "bypass_mode=False"),
        ("ref_log_prob", "policy_divergence", "use_kl_loss=True"),
    ],
)
def test_a_missing_field_is_named_with_its_option(drop: str, method: str, option: str) -> None:
    meta = store_batch(sampled(), drop=[drop])
    with pytest.raises(TokenCreditError, match=f"verl stored no `{drop}`(.|\n)*{option}"):
        build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, {})


def test_a_field_that_only_some_rows_have_is_missing() -> None:
    batch = sampled()
    meta = store_batch(batch)
    others = store_batch(batch, drop=["entropy"])
    meta.keys, meta.tags = meta.keys + others.keys, meta.tags + others.tags
    with pytest.raises(TokenCreditError, match="verl stored no `entropy`"):
        build_trainer(credit_config("+credit=hapo"))._compute_advantage(meta, {})


@pytest.mark.parametrize(
    ("stored_name", "field", "method"),
    [
        ("entropy", "entropies", "hapo"),
        ("old_log_probs", "old_logprobs", "surprisal"),
        ("ref_log_prob", "ref_logprobs", "policy_divergence"),
    ],
)
def test_a_worker_that_returns_nan_stops_training_with_the_place(stored_name: str, field: str, method: str) -> None:
    batch = sampled()
    row, column = batch.response_mask.nonzero()[-1].tolist()
    broken = rows_of(batch)[stored_name].to_padded_tensor(0.0)
    broken[row, column] = torch.nan
    meta = store_batch(batch, **{stored_name: nested(broken, widths(batch))})
    with pytest.raises(TokenCreditError, match=f"step 3: `{field}` must be finite(.)*row {row}, token {column}"):
        build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, {})


def test_a_reward_that_is_nan_stops_training_with_its_row() -> None:
    batch = sampled()
    scores = rows_of(batch)["rm_scores"].to_padded_tensor(0.0)
    scores[4, 0] = torch.nan
    meta = store_batch(batch, rm_scores=nested(scores, widths(batch)))
    with pytest.raises(TokenCreditError, match="step 3: `rewards` must be finite, got nan in row 4"):
        build_trainer(credit_config("+credit=hapo"))._compute_advantage(meta, {})


@pytest.mark.parametrize("method", ["hapo", "gtpo", "empg", "forking_tokens", "surprisal"])
def test_empty_responses_get_nothing_and_change_no_other(method: str) -> None:
    batch = with_host(sampled(seed=10))  # rewards of empty responses count in the host's estimator, as they should
    empty = (batch.group_ids == batch.group_ids[0]) | (torch.arange(len(batch.rewards)) == 5)
    emptied = replace(batch, response_mask=batch.response_mask & ~empty[:, None])
    meta = store_batch(emptied)
    metrics: dict[str, Any] = {}
    build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, metrics)
    kept = {name: value[~empty] for name, value in emptied.tensors().items()}
    alone = TokenBatch(**kept, progress=batch.progress)
    found = stored(meta, "advantages")
    assert_rows(
        [row for row, gone in zip(found, empty, strict=True) if not gone], as_rows(assign_credit(method, alone), alone)
    )
    assert all(float(row.abs().sum()) == 0.0 for row, gone in zip(found, empty, strict=True) if gone)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_batch_without_a_chosen_token_is_refused_by_verl_itself_where_it_corrects_for_the_rollout() -> None:
    batch = sampled()
    meta = store_batch(replace(batch, response_mask=torch.zeros_like(batch.response_mask)))
    with pytest.raises(ValueError, match="response_mask must contain at least one valid token"):
        build_trainer(credit_config("+credit=hapo"))._compute_advantage(meta, {})


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_a_chosen_token_gets_nothing(method: str) -> None:
    batch = sampled()
    meta = store_batch(replace(batch, response_mask=torch.zeros_like(batch.response_mask)), drop=["rollout_log_probs"])
    metrics: dict[str, Any] = {}
    build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, metrics)
    assert all(float(row.abs().sum()) == 0.0 for row in stored(meta, "advantages"))
    assert all(math.isfinite(value) for value in metrics.values())


def test_token_level_advantages_of_the_host_are_refused() -> None:
    meta = store_batch(sampled(holes=False))
    config = credit_config("+credit=hapo", "algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.5")
    with pytest.raises(TokenCreditError, match="one number a response"):
        build_trainer(config)._compute_advantage(meta, {})


SESSIONS = {"uids": ["p", "p", "p", "q", "q"], "sessions": [0, 0, 1, 0, 1], "trajectories": [0, 1, 0, 0, 0]}


def several_trajectories() -> tuple[TokenBatch, Any]:
    """Session 0 of prompt p has two rows; only the last one of a session is scored."""
    batch = sampled(groups=(3, 2), rewards=torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), holes=False)
    mask = torch.arange(9) < torch.tensor([[5], [3], [4], [9], [2]])
    batch = TokenBatch(
        **batch.tensors() | {"response_mask": mask, "group_ids": torch.tensor([0, 0, 0, 1, 1])}, progress=batch.progress
    )
    return batch, put(rows_of(batch), **SESSIONS)


@pytest.mark.parametrize("method", ["surprisal", "w_reinforce"])
def test_sessions_of_several_trajectories_share_the_outcome_of_the_last(method: str) -> None:
    batch, meta = several_trajectories()
    build_trainer(credit_config(f"+credit={method}"))._compute_advantage(meta, {})
    # p: outcomes 1, 0 -> ±0.7071 with the unbiased standard deviation 0.7071; row 0 (not scored) takes row 1's outcome.
    base = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]) * 0.5 / (0.5**0.5 + 1e-6)
    changed = {"host_advantages": base, "rewards": torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])}
    host = TokenBatch(**batch.tensors() | changed, progress=batch.progress)
    assert_rows(stored(meta, "advantages"), as_rows(assign_credit(method, host), batch))


@pytest.mark.parametrize("overrides", [["+credit=gtpo"], ["+credit=surprisal", "algorithm.adv_estimator=rloo"]])
def test_sessions_of_several_trajectories_are_refused_where_rows_are_pooled(overrides: list[str]) -> None:
    _, meta = several_trajectories()
    with pytest.raises(TokenCreditError, match="a session of several trajectories"):
        build_trainer(credit_config(*overrides))._compute_advantage(meta, {})


def teacher_rows(batch: TokenBatch, prompt: int = 3) -> torch.Tensor:
    """As verl's teacher stores them: prompt and response, one place early, one log-prob a token."""
    assert batch.teacher_logprobs is not None
    rows = []
    for values, length in zip(batch.teacher_logprobs, widths(batch), strict=True):
        junk = torch.full((prompt - 1,), -50.0)
        rows.append(torch.cat((junk, values[:length], torch.tensor([-50.0])))[:, None])
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_teacher_logprobs_come_from_verls_distillation_teacher() -> None:
    batch = sampled(seed=6)
    meta = store_batch(batch, teacher_logprobs=teacher_rows(batch))
    teacher = ("enabled=True", "distillation_loss.distillation_loss_coef=0.0", "distillation_loss.loss_mode=k1")
    trainer = build_trainer(credit_config("+credit=opd", *(f"distillation.{value}" for value in teacher)))
    trainer._compute_advantage(meta, {})
    assert_rows(stored(meta, "advantages"), as_rows(assign_credit("opd", with_host(batch)), batch))


def test_teacher_logprobs_may_come_from_the_reference_worker() -> None:
    batch = sampled(seed=7)
    meta = store_batch(batch)
    build_trainer(credit_config("+credit.method=opd", "+credit.teacher=reference"))._compute_advantage(meta, {})
    same = TokenBatch(**with_host(batch).tensors() | {"teacher_logprobs": batch.ref_logprobs}, progress=batch.progress)
    assert_rows(stored(meta, "advantages"), as_rows(assign_credit("opd", same), batch))


def test_draws_repeat_within_a_step_and_differ_between_steps() -> None:
    batch = sampled(seed=8)
    found = []
    for step in (3, 3, 4):
        meta = store_batch(batch)
        build_trainer(credit_config("+credit=random_tokens"), step)._compute_advantage(meta, {})
        found.append(torch.cat(stored(meta, "advantages")))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_records_hold_what_was_trained_and_a_resumed_run_rewrites_its_steps(tmp_path: Path) -> None:
    batch = sampled(seed=9)
    for step in (3, 4, 3):  # the third is a run that resumed at step 3
        meta = store_batch(batch)
        trainer = build_trainer(credit_config("+credit.method=hapo", f"+credit.records={tmp_path}"), step)
        trainer.tokenizer = TOKENIZER
        trainer._compute_advantage(meta, {})
    records = RecordStore(tmp_path)
    assert records.steps == [3]
    (record,) = records
    assert_rows(as_rows(record.advantages, batch), stored(meta, "advantages"), tolerance=0.0)
    assert record.prompts[0] == "7 7"
    torch.testing.assert_close(record.batch.rewards, batch.rewards)
