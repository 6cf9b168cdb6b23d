"""Token signals in a report: the table of concentration, the spectrum, and the colours of the tokens."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.sample_runs import sample_batch, write_run

from tokencredit import CreditRecord, assign_credit
from tokencredit.batch.store import RecordStore
from tokencredit.methods.outcome import group_normalized
from tokencredit.pipeline.pipeline import get_pipeline
from tokencredit.report.run_page.data import PageData
from tokencredit.report.run_page.folders import Run, load_runs
from tokencredit.report.run_page.page import render
from tokencredit.report.run_page.results import metric_curves
from tokencredit.report.run_page.signals import concentration_table, signals_of


def signal_run(folder: Path, label: str, seed: int = 0) -> Path:
    """A run whose records carry what a LoRA run with KL carries."""
    folder.mkdir(parents=True)
    pipeline = get_pipeline(label)
    content = {
        "label": label,
        "seed": seed,
        "pipeline": pipeline.to_config(),
        "status": "finished",
        "task": "countdown",
    }
    (folder / "run.json").write_text(json.dumps(content))
    store = RecordStore(folder / "records")
    for step in (0, 50, 100):
        batch, tokens, prompts = sample_batch(step, seed)
        draws = torch.Generator().manual_seed(step)
        noise = torch.rand(batch.response_mask.shape, generator=draws)
        batch = replace(
            batch,
            step=step,
            host_advantages=group_normalized(batch)[:, 0].float(),
            old_logprobs=-batch.entropies,
            ref_logprobs=-batch.entropies - 0.1 * noise,
            adapter_residuals=step / 100 * (0.2 + noise),  # B = 0 at the start
            attention_entropies=0.3 + 0.6 * noise,
        )
        advantages = assign_credit(pipeline, batch)
        record = {"pipeline": pipeline.to_config(), "tokens": tokens, "prompts": prompts}
        store.append(CreditRecord(step=step, batch=batch, advantages=advantages, **record))
    return folder


def load(folder: Path) -> list[Run]:
    return load_runs([signal_run(folder / "arca", "arca"), signal_run(folder / "attention", "attention")])


def test_the_table_has_a_row_for_each_signal_that_is_carried(tmp_path: Path) -> None:
    data = PageData.of(load(tmp_path))
    rows = {(row.label, row.signal): row for row in concentration_table(data)}
    assert list(signals_of(data.last["arca"][0].batch)) == [
        "surprisal",
        "entropy reduction",
        "policy divergence",
        "adapter residual",
    ]
    assert len(rows) == 8
    row = rows["arca", "adapter residual"]
    # α uniform on [0.2, 1.2], mean 0.7: G = (b − a)/(3(a + b)) = 0.238, EffN/T = 0.49/(0.49 + 1/12) = 0.855
    assert row.gini == pytest.approx(0.238, abs=0.04)
    assert row.ratio == pytest.approx(0.855, abs=0.04)
    assert row.gini_sharp > row.gini
    assert row.ratio_sharp < row.ratio
    # Nobody weighs by a signal: no table.
    plain = load_runs([write_run(tmp_path / "hapo", "hapo", 0, steps=25, every=25)])
    assert concentration_table(PageData.of(plain)) == []


def test_the_page_shows_signals_where_they_are_recorded(tmp_path: Path) -> None:
    runs = load(tmp_path)
    page = render(runs)
    for text in (
        'id="signals"',
        "Gini coefficient of the adapter residual",
        "Spectrum of Ê, arca",
        "Credit by attention entropy",
        "Adapter residual by position",
        '<select id="colour">',
        '<option value="e">attention entropy',
        'data-r="',
        "--e:",
    ):
        assert text in page, text
    # The axes are named after what they show, never after a method.
    assert page.count(">position in the response, %<") == 3
    assert page.count(">attention entropy Ê, % of ln N<") == 1
    plain = render(load_runs([write_run(tmp_path / "hapo", "hapo", 0, steps=25, every=25)]))
    for text in ('id="signals"', '<select id="colour">', 'data-e="', "--r:"):
        assert text not in plain, text


def test_curves_read_the_records_over_training(tmp_path: Path) -> None:
    from tokencredit.report.run_page.signals import _over_training

    runs = load(tmp_path)
    found = _over_training(runs[0])
    assert sorted(found["surprisal"]) == [0, 50, 100]
    # At B = 0 the residual is nowhere: weights are uniform, G = 0.
    assert found["adapter residual"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["adapter residual"][100] > 0.1
    (curve,) = metric_curves(runs[:1], lambda run: found["adapter residual"])
    assert curve.label == "arca"
