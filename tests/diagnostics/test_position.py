"""Position profiles count relative to each response's own length."""

import torch

from tokencredit.diagnostics.position import position_profile, profile_sums


def test_by_hand() -> None:
    # Two bins. Row 0 has four tokens (a hole between): 1, 2 | 3, 4. Row 1 has one: first bin. Row 2 has none.
    values = torch.tensor([[1.0, torch.nan, 2.0, 3.0, 4.0], [9.0] + [torch.nan] * 4, [torch.nan] * 5])
    found = position_profile(values, ~torch.isnan(values), bins=2)
    torch.testing.assert_close(found.mean, torch.tensor([4.0, 3.5]).double())  # (1 + 2 + 9)/3, (3 + 4)/2
    assert found.tokens.tolist() == [3, 2]


def test_last_token_falls_into_the_last_bin_and_short_rows_leave_bins_empty() -> None:
    values = torch.tensor([[5.0, 7.0, torch.nan]])
    found = position_profile(values, ~torch.isnan(values), bins=10)
    assert found.tokens.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert found.mean[[0, 5]].tolist() == [5.0, 7.0] and bool(torch.isnan(found.mean[1]))
    full = torch.arange(20.0)[None]
    assert position_profile(full, torch.ones_like(full, dtype=torch.bool)).mean[-1] == 18.5


def test_no_token_at_all() -> None:
    found = position_profile(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), bins=3)
    assert found.tokens.sum() == 0 and bool(torch.isnan(found.mean).all())


def test_sums_by_hand() -> None:
    # Row 0: halves (1, −3) and (5, 7); row 1 has one chosen token, in the first half.
    x = torch.tensor([[1.0, torch.nan, -3.0, 5.0, 7.0], [torch.nan, 2.0, torch.nan, torch.nan, torch.nan]])
    found = profile_sums(x, ~torch.isnan(x), bins=2)
    assert found.tolist() == [[0.0, 12.0], [6.0, 12.0], [3.0, 2.0]]
