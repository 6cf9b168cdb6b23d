"""The batch record and the masked reductions: what is refused, and what reaches whom."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import jaxtyping
import pytest
import torch

from tokencredit.errors import TokenCreditError
from tokencredit.masked import compact, positions, row_quantile, spread, unit_moments, unit_sums
from tokencredit.records import COLLECTORS, OPTIONAL_FIELDS, TokenBatch

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
