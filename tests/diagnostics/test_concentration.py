"""Concentration: golden values by hand and closed forms. Each response has one vote."""

import math

import pytest
import torch

from tokencredit.diagnostics.concentration import (
    effective_token_ratio,
    gini,
    mean_over_responses,
)

RAMP = [1.0, 2.0, 3.0, 4.0, 5.0]
# weights, G, EffN/T
GOLDEN = [
    ([3.0] * 7, 0.0, 1.0),  # uniform
    ([0.0, 0.0, 0.0, 2.0], 3 / 4, 1 / 4),  # one of n: (n−1)/n, 1/n
    ([1.0, 1.0] + [0.0] * 8, 0.8, 0.2),  # k of n: 1 − k/n, k/n
    (RAMP, 4 / 15, 18 / 22),  # ramp: (n−1)/(3n), 3(n+1)/(2(2n+1)); .266667, .818182
    ([float(i) for i in range(1, 11)], 0.3, 33 / 42),  # .785714
    ([float(i * i) for i in range(1, 11)], 0.47142857, 0.58510638),  # Σi²=385: 385²/(10·25333)
    ([1.0] * 8 + [5.0] * 2, 0.35555556, 0.55862069),  # f=.2, c=5, D=1.8: .2·.8·4/1.8; 1.8²/(.8+.2·25)
    # tokens of one response, log π = −.1, −2.3, −.5, −1.1: α = .1, 2.3, .5, 1.1, Σ = 4, Σα² = 6.76
    ([0.1, 2.3, 0.5, 1.1], 0.45, 16 / (4 * 6.76)),  # G = (−3·.1 −.5 + 1.1 + 3·2.3)/(4·4) = 7.2/16
    ([1.2, 0.0, 1.0, 0.0], 0.52272727, 0.49590164),
    ([0.1, 0.3, 0.0, 0.8], 0.54166667, 0.48648649),
    ([0.5, 0.5, 0.0, 0.1], 0.43181818, 0.59313725),
    ([0.01, 5.29, 0.25, 1.21], 0.62130178, 0.38712555),  # the first, squared
]


def row(values: list[float], length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.full((1, length), torch.nan, dtype=torch.float64)
    weights[0, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return weights, torch.arange(length)[None] < len(values)


@pytest.mark.parametrize(("values", "expected_gini", "expected_ratio"), GOLDEN)
def test_golden(values: list[float], expected_gini: float, expected_ratio: float) -> None:
    weights, mask = row(values)
    assert gini(weights, mask).item() == pytest.approx(expected_gini, abs=1e-6)
    assert effective_token_ratio(weights, mask).item() == pytest.approx(expected_ratio, abs=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 1e-200, 1e200])
def test_magnitude_and_scale_do_not_matter(scale: float) -> None:
    weights, mask = row(RAMP)
    assert gini(weights * scale, mask).item() == pytest.approx(4 / 15)
    assert effective_token_ratio(weights * scale, mask).item() == pytest.approx(18 / 22)


def test_holes_and_order_do_not_matter() -> None:
    weights = torch.tensor([[5.0, torch.nan, 3.0, 1.0, torch.nan, 4.0, 2.0]])
    mask = ~torch.isnan(weights)
    assert gini(weights, mask).item() == pytest.approx(4 / 15)
    assert effective_token_ratio(weights, mask).item() == pytest.approx(18 / 22)


def test_closed_forms_in_the_limit() -> None:
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[None]
    full = torch.ones_like(uniform, dtype=torch.bool)
    for power in (1, 2):  # uniform(0,1)^p: p/(p+2), (2p+1)/(p+1)²
        assert gini(uniform**power, full).item() == pytest.approx(power / (power + 2), abs=1e-3)
        assert effective_token_ratio(uniform**power, full).item() == pytest.approx(
            (2 * power + 1) / (power + 1) ** 2, abs=1e-3
        )
    normal = torch.special.ndtri((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000)[None]
    full = torch.ones_like(normal, dtype=torch.bool)
    # log-normal, log-std .5: erf(.25), exp(−.25)
    assert gini((0.5 * normal).exp(), full).item() == pytest.approx(math.erf(0.25), abs=1e-3)
    assert effective_token_ratio((0.5 * normal).exp(), full).item() == pytest.approx(math.exp(-0.25), abs=1e-3)


def test_undefined_responses_are_excluded_and_counted() -> None:
    weights = torch.tensor([[1.0, 1.0], [2.0, torch.nan], [torch.nan, torch.nan], [0.0, 0.0], [1.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True], [True, True]])
    torch.testing.assert_close(
        gini(weights, mask), torch.tensor([0.0, torch.nan, torch.nan, torch.nan, 0.5]).double(), equal_nan=True
    )
    torch.testing.assert_close(
        effective_token_ratio(weights, mask),
        torch.tensor([1.0, 1.0, torch.nan, torch.nan, 0.5]).double(),
        equal_nan=True,
    )
    assert mean_over_responses(gini(weights, mask)) == (0.25, 2, 3)
    assert math.isnan(mean_over_responses(gini(weights[2:3], mask[2:3])).value)
