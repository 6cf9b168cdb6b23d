"""The proxy detector: counts by hand, ties, and a null that keeps prompts and responses whole."""

import numpy as np
import pytest
import torch

from tokencredit import TokenBatch
from tokencredit.diagnostics.proxy import binned_information, proxy_information


def make(entropies: torch.Tensor, rewards: list[float], groups: list[int]) -> TokenBatch:
    rows, length = entropies.shape
    return TokenBatch(
        response_ids=torch.zeros(rows, length, dtype=torch.long),
        response_mask=~torch.isnan(entropies),
        rewards=torch.tensor(rewards),
        group_ids=torch.tensor(groups),
        entropies=entropies,
    )


def test_counts_by_hand() -> None:
    # low entropy: 1 accepted, 5 not; high: 1 and 1; p = 2/8
    # 6/8·(1/6·ln(4/6) + 5/6·ln(10/9)) = .015167;  2/8·(½ ln 2 + ½ ln(2/3)) = .035960
    found = binned_information(np.array([[1.0, 1.0]]), np.array([6.0, 2.0]))
    np.testing.assert_allclose(found, [[0.015167, 0.035960]], atol=1e-6)


def test_ties_share_a_bin() -> None:
    # Each row one response of two tokens: H = 0 for six tokens, 3 for two; the accepted response has one of each.
    nan = torch.nan
    entropies = torch.tensor([[0.0, 3.0, nan], [0.0, 3.0, nan], [0.0, 0.0, nan], [0.0, 0.0, nan]])
    found = proxy_information(make(entropies, [1.0, -1.0, -1.0, -1.0], [0, 0, 0, 0]), bins=2)
    assert found.tokens.tolist() == [6, 2] and found.low.tolist() == [0.0, 3.0] == found.high.tolist()
    np.testing.assert_allclose(found.per_bin, [0.015167, 0.035960], atol=1e-6)
    assert found.total == pytest.approx(0.051127, abs=1e-6)
    assert found.bias == 1 / 16
    # Half of the permutations put the accepted response on a row with a high token and give the same number; the others
    # say more: low 2 of 6, high 0 of 2 gives 6/8·(1/3·ln(4/3) + 2/3·ln(8/9)) + 2/8·ln(4/3) = .013029 + .071921.
    same = np.isclose(found.null.sum(1), found.total)
    assert 0.3 < same.mean() < 0.7 and found.null.shape == (200, 2)
    np.testing.assert_allclose(found.null[~same], np.tile([0.013029, 0.071921], ((~same).sum(), 1)), atol=1e-6)
    assert found.p_value == 1.0


def test_equal_counts() -> None:
    entropies = torch.rand((40, 50), generator=torch.Generator().manual_seed(0))
    found = proxy_information(make(entropies, [1.0, 0.0] * 20, [i // 4 for i in range(40)]))
    assert found.tokens.tolist() == [100] * 20
    assert bool((found.low[1:] >= found.high[:-1]).all())


def test_finds_a_tail_that_only_failures_have_and_nothing_without() -> None:
    rng = torch.Generator().manual_seed(1)
    entropies = torch.rand((64, 40), generator=rng)
    rewards = [float(i % 2) for i in range(64)]
    groups = [i // 8 for i in range(64)]
    nothing = proxy_information(make(entropies, rewards, groups))
    assert nothing.p_value > 0.05
    assert nothing.total == pytest.approx(nothing.bias, abs=2 * nothing.bias)
    tail = torch.where((torch.arange(64)[:, None] % 2 == 0) & (torch.arange(40)[None] < 4), 5.0 + entropies, entropies)
    found = proxy_information(make(tail, rewards, groups))
    assert found.p_value == 1 / 201
    limit = np.quantile(found.null, 0.99, axis=0)
    assert found.per_bin[-1] > limit[-1]


def test_difficulty_alone_is_no_signal() -> None:
    # Prompt 0 is easy and of low entropy, prompt 1 hard and of high entropy: all information is between prompts.
    rng = torch.Generator().manual_seed(2)
    entropies = torch.rand((40, 30), generator=rng) + torch.tensor([0.0, 2.0]).repeat_interleave(20)[:, None]
    rewards = [1.0] * 18 + [0.0] * 2 + [0.0] * 18 + [1.0] * 2
    found = proxy_information(make(entropies, rewards, [0] * 20 + [1] * 20))
    assert found.total > 0.3 and found.p_value > 0.01


def test_one_outcome_carries_no_information() -> None:
    found = proxy_information(make(torch.rand(3, 4), [1.0, 1.0, 1.0], [0, 0, 0]))
    assert found.total == 0.0 and found.p_value == 1.0


def test_no_tokens() -> None:
    found = proxy_information(make(torch.full((2, 3), torch.nan), [0.0, 1.0], [0, 0]))
    assert found.total == 0.0 and found.bias == 0.0 and len(found.tokens) == 0
