"""Where the numbers behind the pictures come from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import sample_runs

from tokencredit.diagnostics.position import position_profile
from tokencredit.report.run_page.data import credit_series, pooled_profile
from tokencredit.report.run_page.folders import Line, load_runs


def test_logged_numbers_win_over_those_of_the_records(tmp_path: Path) -> None:
    (run,) = load_runs([sample_runs.write_run(tmp_path / "run", "hapo", 0, steps=0)])
    from_records = credit_series(replace(run, lines=()))
    assert credit_series(run).keys() == from_records.keys()
    for name, series in credit_series(run).items():
        assert series == pytest.approx(from_records[name])
    logged = [Line(0, "train", {"credit/gini": 0.5, "reward": 1.0}, None), Line(0, "eval", {"credit/net": 1.0}, None)]
    assert credit_series(replace(run, lines=logged)) == {"credit/gini": {0: 0.5}}


def test_pooled_profiles_count_tokens() -> None:
    batch, _, _ = sample_runs.sample_batch(0, 0)
    entropies, mask = batch.require("entropies"), batch.response_mask
    whole = position_profile(entropies, mask).mean.numpy()
    halves = [(entropies[rows], mask[rows]) for rows in (slice(0, 5), slice(5, None))]
    np.testing.assert_allclose(pooled_profile(halves)[0], whole)
