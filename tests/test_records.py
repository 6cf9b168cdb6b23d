"""The batch record and the masked reductions: what is refused, and what reaches whom."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from tokencredit.batch.masked import compact, positions, row_quantile, spread, unit_moments, unit_sums
from tokencredit.batch.records import COLLECTORS, OPTIONAL_FIELDS, CreditRecord, TokenBatch, with_a_column
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.assign import assign_credit

NAN = math.nan


def fields(**given: Any) -> dict[str, Any]:
    """Two responses of three places; the last place of the first is padding."""
    return {
        "response_ids": torch.arange(6).reshape(2, 3),
        "response_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "rewards": torch.tensor([1.0, 0.0]),
        "group_ids": torch.tensor([5, 5]),
    } | given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": torch.tensor([1.0, NAN])}, r"`rewards` must be finite, got nan in row 1"),
        ({"rewards": torch.tensor([-math.inf, NAN])}, r"`rewards` must be finite, got -inf in row 0"),
        ({"rewards": torch.tensor([1.0])}, r"`rewards` must have shape \[2\], got \[1\]"),
        ({"group_ids": torch.tensor([[5], [5]])}, r"`group_ids` must have shape \[2\], got \[2, 1\]"),
        ({"response_mask": torch.ones(2, 2).bool()}, r"`response_mask` must have shape \[2, 3\], got \[2, 2\]"),
        ({"response_mask": torch.ones(2, 3)}, r"`response_mask` must be bool, got torch.float32"),
        ({"response_ids": torch.arange(6)}, r"`response_ids` must be \[batch, response\], got shape \[6\]"),
        ({"entropies": torch.zeros(3, 2)}, r"`entropies` must have shape \[2, 3\], got \[3, 2\]"),
        ({"step_ids": torch.zeros(3).long()}, r"`step_ids` must have shape \[2, 3\], got \[3\]"),
        ({"progress": 1.5}, r"`progress` must be in \[0, 1\], got 1.5"),
        ({"progress": NAN}, r"`progress` must be in \[0, 1\], got nan"),
    ],
)
def test_the_first_gate_refuses(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as in production, where no type checker stands before the gate
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TokenCreditError, match=message):
        TokenBatch(**fields(**given))


def test_a_hole_in_a_field_is_refused_with_its_place_and_source() -> None:
    broken = torch.tensor([[0.1, 0.2, NAN], [0.3, math.inf, 0.4]])
    batch = TokenBatch(**fields(entropies=broken))
    with pytest.raises(TokenCreditError, match=r"`entropies` must be finite .* where the mask is True") as caught:
        batch.require("entropies")
    assert "got inf at row 1, token 1" in caught.value.message
    assert caught.value.hint == f"it comes from: {COLLECTORS['entropies']}"


def test_nan_outside_the_mask_is_welcome() -> None:
    batch = TokenBatch(**fields(entropies=torch.tensor([[0.1, 0.2, NAN], [0.3, 0.5, 0.4]])))
    assert batch.carried == {"entropies"}
    assert set(batch.tensors()) == {"response_ids", "response_mask", "rewards", "group_ids", "entropies"}


def test_require_returns_or_names_the_collector() -> None:
    entropies = torch.zeros(2, 3)
    assert TokenBatch(**fields(entropies=entropies)).require("entropies") is entropies
    for name in OPTIONAL_FIELDS:
        with pytest.raises(TokenCreditError, match=f"needs `{name}`, which this batch does not carry") as caught:
            TokenBatch(**fields()).require(name)
        assert COLLECTORS[name] in str(caught.value.hint)
    with pytest.raises(TokenCreditError, match="unknown batch field 'entropy', did you mean 'entropies'"):
        TokenBatch(**fields()).require("entropy")


def test_a_batch_is_frozen_and_replace_checks_again() -> None:
    batch = TokenBatch(**fields())
    with pytest.raises(FrozenInstanceError):
        batch.rewards = torch.zeros(2)  # type: ignore[misc]
    with pytest.raises(TokenCreditError, match="`progress` must be in"):
        replace(batch, values=torch.zeros(2, 3), progress=2.0)
    assert batch.values is None


def test_errors_carry_message_and_hint_apart() -> None:
    error = TokenCreditError("what is wrong", hint="what to do")
    assert (error.message, error.hint, str(error)) == (
        "what is wrong",
        "what to do",
        "what is wrong\n\nhint: what to do",
    )
    assert isinstance(error, ValueError)


MASK = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
VALUES = torch.tensor([[1.0, NAN, 2.0, 6.0], [NAN] * 4, [NAN, 5.0, NAN, NAN]], dtype=torch.float64)


def masked_batch() -> TokenBatch:
    return TokenBatch(
        response_ids=torch.zeros(3, 4, dtype=torch.long),
        response_mask=MASK,
        rewards=torch.zeros(3),
        group_ids=torch.tensor([2, 2, 9]),
    )


def test_compact_and_spread_undo_each_other() -> None:
    left = torch.tensor([[1.0, 2.0, 6.0, 0.0], [0.0] * 4, [5.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(compact(VALUES, MASK), left)
    torch.testing.assert_close(spread(left, MASK), torch.where(MASK, VALUES, 0.0))
    assert positions(MASK)[0, [0, 2, 3]].tolist() == [0, 1, 2]
    torch.testing.assert_close(compact(MASK, MASK).sum(1), torch.tensor([3, 0, 1]))


def test_moments_pool_the_tokens_of_the_unit() -> None:
    # response 0: 1, 2, 6 -> mean 3, variance (4 + 1 + 9)/3; response 1 is empty; response 2: 5
    moments = unit_moments(VALUES, masked_batch(), "response")
    torch.testing.assert_close(moments.mean[:, 0], torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(moments.std[:, 0], torch.tensor([(14 / 3) ** 0.5, 0.0, 0.0], dtype=torch.float64))
    # the empty response sees its group's mean
    assert unit_moments(VALUES, masked_batch(), "group").mean[:, 0].tolist() == [3.0, 3.0, 5.0]
    # batch: 14 / 4 = 3.5
    assert unit_moments(VALUES, masked_batch(), "batch").mean[:, 0].tolist() == [3.5] * 3
    assert unit_sums(VALUES, masked_batch(), torch.tensor([0, 1, 0]))[:, 0].tolist() == [14.0, 0.0, 14.0]


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.25, 1.5), (0.5, 2.0), (0.75, 4.0), (1.0, 6.0)])
def test_row_quantile(q: float, expected: float) -> None:
    # of 1, 2, 6: place 2 q, linear between neighbours; an empty row gives 0, a single value itself
    assert row_quantile(VALUES, MASK, q)[:, 0].tolist() == [expected, 0.0, 5.0]


def refused(message: str, **given: Any) -> TokenCreditError:
    """The error for a batch with these fields, as in production."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        with pytest.raises(TokenCreditError, match=message) as caught:
            TokenBatch(**fields(**given))
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"response_ids": [[1, 2, 3], [4, 5, 6]]}, "`response_ids` is a list: pass a torch.Tensor"),
        ({"rewards": [1.0, 0.0]}, "`rewards` is a list: pass a torch.Tensor"),
        ({"rewards": None}, "`rewards` is a NoneType: pass a torch.Tensor"),
        ({"entropies": np.zeros((2, 3))}, "`entropies` is a ndarray: pass a torch.Tensor"),
        ({"group_ids": (0, 0)}, "`group_ids` is a tuple"),
        ({"entropies": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, "`entropies` must be float16 .*, got torch.float8"),
        ({"entropies": torch.zeros(2, 3).to_sparse()}, "`entropies` must be a dense tensor, got a sparse_coo one"),
        ({"entropies": torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)])}, "dense tensor, got a nested"),
        ({"entropies": torch.zeros(2, 3, device="meta")}, "`entropies` is on the device meta"),
        ({"response_ids": torch.zeros(2, 3)}, "`response_ids` must be int8 or .*, got torch.float32"),
        ({"rewards": torch.tensor([1, 0])}, "`rewards` must be float16 or .*, got torch.int64"),
        ({"old_logprobs": torch.zeros(2, 3, dtype=torch.complex64)}, "`old_logprobs` must be .*, got torch.complex64"),
        ({"scored": torch.ones(2)}, "`scored` must be bool, got torch.float32"),
        ({"scored": torch.ones(3).bool()}, r"`scored` must have shape \[2\], got \[3\]"),
        ({"rewards": torch.tensor([1e308, 0.0], dtype=torch.float64)}, "`rewards` must be finite, got 1e.308 in row 0"),
        ({"progress": []}, r"`progress` must be in \[0, 1\], got \[\]"),
        ({"progress": "0.5"}, "`progress` must be in .*, got '0.5'"),
        ({"progress": 10**400}, "`progress` must be in"),
        ({"step": -1}, "`step` must be a whole number of at least 0, got -1"),
        ({"step": 2.0}, "`step` must be a whole number of at least 0, got 2.0"),
        ({"step": True}, "`step` must be a whole number"),
        ({"reducer": None}, "`reducer` must be a Reducer, got NoneType"),
    ],
)
def test_the_first_gate_names_the_field_and_the_remedy(given: dict[str, Any], message: str) -> None:
    error = refused(message, **given)
    if "pass a torch.Tensor" in message or "dense" in message:
        assert error.hint


def test_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 1)

    elsewhere = torch.zeros(2, 3).as_subclass(Elsewhere)
    error = refused("`entropies` is on cuda:1, but `response_ids` is on cpu", entropies=elsewhere)
    assert ".to(device)" in (error.hint or "")


# --- values are examined where they are read


def test_a_field_that_nobody_reads_may_hold_anything() -> None:
    broken = torch.tensor([[NAN, math.inf, 0.0], [-math.inf, 2.0, 0.3]])
    batch = TokenBatch(**fields(rollout_logprobs=broken, entropies=torch.rand(2, 3)))
    whole = replace(batch, rollout_logprobs=None)
    assert torch.equal(assign_credit("hapo", batch), assign_credit("hapo", whole))
    with pytest.raises(TokenCreditError, match=r"`rollout_logprobs` must be finite .* got nan at row 0, token 0"):
        batch.require("rollout_logprobs")


@pytest.mark.parametrize(
    ("name", "credit", "value", "message"),
    [
        (
            "old_logprobs",
            "surprisal",
            0.5,
            r"`old_logprobs` must be at most 0 \(up to rounding\), got 0.5 at row 1, token 2",
        ),
        ("old_logprobs", "surprisal", 2e-3, "`old_logprobs` must be at most 0"),
        ("old_logprobs", "surprisal", math.inf, "`old_logprobs` must be finite"),
        ("teacher_logprobs", "opd", 0.1, "`teacher_logprobs` must be at most 0"),
        ("ref_logprobs", "policy_divergence", 1.0, "`ref_logprobs` must be at most 0"),
        ("entropies", "hapo", -0.5, r"`entropies` must be at least 0 \(up to rounding\), got -0.5 at row 1, token 2"),
        ("attention_entropies", "anchors", -1.0, "`attention_entropies` must be at least 0"),
        ("adapter_residuals", "arca", -1.0, "`adapter_residuals` must be at least 0"),
        ("entropies", "hapo", 1e300, "`entropies` must be finite .*, got 1e.300 at row 1, token 2"),
    ],
)
def test_the_door_refuses_what_is_outside_a_fields_domain(name: str, credit: str, value: float, message: str) -> None:
    inside = -torch.ones(2, 3) if name.endswith("logprobs") else torch.ones(2, 3)
    given = {"old_logprobs": -torch.ones(2, 3), name: inside.double()}
    assign_credit(credit, TokenBatch(**fields(**given)))
    given[name][1, 2] = value
    with pytest.raises(TokenCreditError, match=message) as caught:
        assign_credit(credit, TokenBatch(**fields(**given)))
    assert caught.value.hint == f"it comes from: {COLLECTORS[name]}"
    given[name][1, 2], given[name][0, 2] = inside[0, 0], value  # padding
    assign_credit(credit, TokenBatch(**fields(**given)))


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, 1e-3), (torch.float32, 1e-3), (torch.bfloat16, 0.125), (torch.float16, 2.0**-6)],
)
def test_rounding_past_the_end_of_a_domain_is_accepted(dtype: torch.dtype, rounding: float) -> None:
    for name, credit, sign in (("old_logprobs", "surprisal", 1.0), ("entropies", "hapo", -1.0)):
        value = torch.full((2, 3), 0.99 * sign * rounding).to(dtype)
        assert bool(torch.isfinite(assign_credit(credit, TokenBatch(**fields(**{name: value})))).all())
        with pytest.raises(TokenCreditError, match=f"`{name}` must be"):
            assign_credit(credit, TokenBatch(**fields(**{name: 1.2 * value})))


def test_a_pipeline_examines_each_field_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TokenBatch(**fields(entropies=torch.rand(2, 3), old_logprobs=-torch.rand(2, 3)))
    looked: list[str] = []
    original = TokenBatch._is_plainly_sound
    monkeypatch.setattr(
        TokenBatch, "_is_plainly_sound", lambda self, name, *more: looked.append(name) or original(self, name, *more)
    )
    assign_credit("hapo + steer + 0.5 * surprisal", batch)
    assert sorted(looked) == ["entropies", "old_logprobs"]


def test_a_doubling_ratio_of_nothing_is_nan_and_closes_the_gate() -> None:
    given = {"adapter_residuals": torch.rand(2, 3), "doubling_ratios": torch.tensor([NAN, 2.0])}
    credit = assign_credit({"arca": {"gate": 1.5}}, TokenBatch(**fields(**given)))
    assert torch.equal(credit[0, :2], credit[0, :1].expand(2)) and len(credit[1].unique()) == 3


# --- rows that count


def test_an_unscored_row_may_hold_nan() -> None:
    given = {"rewards": torch.tensor([NAN, 1.0]), "host_advantages": torch.tensor([NAN, 1.0])}
    batch = TokenBatch(
        **fields(scored=torch.tensor([False, True]), entropies=torch.tensor([[NAN] * 3, [0.1] * 3]), **given)
    )
    assert batch.counted.tolist() == [False, True]
    assert assign_credit("hapo", batch)[0].tolist() == [0.0, 0.0, 0.0]
    refused("`rewards` must be finite, got nan in row 0", rewards=given["rewards"], scored=torch.tensor([True, False]))


def test_rows_and_counted() -> None:
    scored = torch.tensor([True, False])
    batch = TokenBatch(**fields(scored=scored, entropies=torch.rand(2, 3), progress=0.5, step=7))
    assert TokenBatch(**fields()).counted.tolist() == [True, True]
    assert batch.counted.tolist() == [True, False]
    assert replace(batch, response_mask=torch.zeros(2, 3).bool()).counted.tolist() == [False, False]
    part = batch.rows(torch.tensor([1]))
    assert part.scored.tolist() == [False] and (part.progress, part.step, part.reducer) == (0.5, 7, batch.reducer)
    assert {name: value.shape[0] for name, value in part.tensors().items()} == dict.fromkeys(batch.tensors(), 1)
    assert with_a_column(replace(batch, response_mask=torch.zeros(2, 3).bool())).step == 7


def test_a_batch_prints_in_one_line_without_its_values() -> None:
    batch = TokenBatch(**fields(entropies=torch.rand(2, 3).bfloat16(), progress=0.25, step=3))
    assert repr(batch) == (
        "TokenBatch(2 responses × 3 tokens on cpu: response_ids int64, response_mask bool, rewards float32, "
        "group_ids int64, entropies bfloat16, progress=0.25, step=3)"
    )
    record = CreditRecord(step=1, pipeline="hapo", batch=batch, advantages=torch.zeros(2, 3), tokens=[["a"] * 3] * 2)
    assert repr(record) == f"CreditRecord(step=1, pipeline='hapo', batch={batch!r})"


def test_a_batch_survives_copies_and_pickling() -> None:
    batch = TokenBatch(**fields(entropies=torch.rand(2, 3)))
    assert torch.equal(copy.deepcopy(batch).require("entropies"), batch.entropies)
    assert torch.equal(pickle.loads(pickle.dumps(batch)).require("entropies"), batch.entropies)
