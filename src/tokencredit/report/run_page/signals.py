"""The report's section on token signals: how concentrated each one is, and where entropies and residuals lie."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import CreditRecord, TokenBatch
from tokencredit.diagnostics.concentration import effective_token_ratio, gini, mean_over_responses
from tokencredit.diagnostics.position import position_profile
from tokencredit.methods.likelihood import entropy_drops, score_weights
from tokencredit.pipeline.labels import reports_in
from tokencredit.report import plots
from tokencredit.report.run_page.folders import Run
from tokencredit.report.run_page.results import metric_curves
from tokencredit.report.run_page.tokens import polarity_of, visible

SHOWN = 12  # records of a run that the curves read, evenly spaced
BINS = 10  # of the spectrum, over [0, 1]

Drawn = tuple[str, str, str]  # title, unit, svg
Last = Mapping[str, Sequence[CreditRecord]]  # label → the last record of each of its runs


class Concentration(NamedTuple):
    """Gini coefficient and effective-token ratio of one signal's weights at sharpening 1 and 2, as in ARCA's table."""

    label: str
    signal: str
    gini: float
    ratio: float
    gini_sharp: float
    ratio_sharp: float


def signals_of(batch: TokenBatch) -> dict[str, Tensor]:
    """The token signals that a record carries, before any normalisation, by name."""
    found: dict[str, Tensor] = {}
    if batch.old_logprobs is not None:
        found["surprisal"] = -batch.old_logprobs
    if batch.entropies is not None:
        found["entropy reduction"] = entropy_drops(batch.entropies, batch.response_mask)
    if batch.old_logprobs is not None and batch.ref_logprobs is not None:
        found["policy divergence"] = (batch.old_logprobs - batch.ref_logprobs).abs()
    if batch.adapter_residuals is not None:
        found["adapter residual"] = batch.adapter_residuals
    return found


def concentration_table(runs: Sequence[Run], last: Last) -> list[Concentration]:
    """One row a method and signal, from the last record of each run; nothing where no method weighs by a signal."""
    if not _concerned(runs):
        return []
    rows = []
    for label, records in last.items():
        for signal in dict.fromkeys(name for record in records for name in signals_of(record.batch)):
            carried = [record.batch for record in records if signal in signals_of(record.batch)]
            numbers = [_numbers(batch, signals_of(batch)[signal]) for batch in carried]
            means = [sum(column) / len(column) for column in zip(*numbers, strict=True)]
            rows.append(Concentration(label, signal, *means))
    return rows


def signal_pictures(runs: Sequence[Run], styles: dict[str, plots.Style], last: Last) -> list[Drawn]:
    """Concentration of each signal over training, the spectrum of attention entropy, and what credit follows it."""
    found: list[Drawn] = []
    series = {id(run): _over_training(run) for run in runs} if _concerned(runs) else {}
    for signal in dict.fromkeys(name for of_run in series.values() for name in of_run):
        lines = metric_curves(runs, lambda run, signal=signal: series[id(run)].get(signal, {}))
        svg = plots.curves(f"signal-{signal.replace(' ', '-')}", lines, styles, unit_interval=True)
        found.append((f"Gini coefficient of the {signal}", "of the signal, not of the credit; p = 1", svg))
    return found + _spectra(last, styles) + _residuals(last, styles)


def _concerned(runs: Sequence[Run]) -> bool:
    return any(reports_in("signals", run.pipeline) for run in runs)


def _numbers(batch: TokenBatch, scores: Tensor) -> tuple[float, float, float, float]:
    found: list[float] = []
    for sharpening in (1.0, 2.0):
        weights = score_weights(chosen(scores, batch.response_mask), batch.response_mask, sharpening=sharpening)
        found += [
            mean_over_responses(measure(weights, batch.response_mask)).value
            for measure in (gini, effective_token_ratio)
        ]
    return found[0], found[1], found[2], found[3]


def _over_training(run: Run) -> dict[str, dict[int, float]]:
    """Signal → step → Gini coefficient at p = 1."""
    count = len(run.records)
    picked = sorted({round(k * (count - 1) / max(SHOWN - 1, 1)) for k in range(SHOWN)}) if count else []
    found: dict[str, dict[int, float]] = {}
    for number in picked:
        record = run.records.read(number)
        for signal, scores in signals_of(record.batch).items():
            value = _numbers(record.batch, scores)[0]
            if not math.isnan(value):
                found.setdefault(signal, {})[record.step] = value
    return found


def _spectra(last: Last, styles: dict[str, plots.Style]) -> list[Drawn]:
    """How the tokens of each polarity spread over Ê, and the credit of each tenth of Ê."""
    found: list[Drawn] = []
    followed: dict[str, Sequence[float]] = {}
    for number, (label, records) in enumerate(last.items()):
        carried = [record for record in records if record.batch.attention_entropies is not None]
        if not carried:
            continue
        counts = {"positive": [0.0] * BINS, "negative": [0.0] * BINS, "none": [0.0] * BINS}
        credit, tokens = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
        for record in carried:
            mask = record.batch.response_mask
            bins = (record.batch.require("attention_entropies")[mask] * BINS).long().clamp(0, BINS - 1)
            polarity = polarity_of(record)[mask]
            for name, side in (("positive", polarity > 0), ("negative", polarity < 0), ("none", polarity == 0)):
                here = torch.bincount(bins[side], minlength=BINS).tolist()
                counts[name] = [a + b for a, b in zip(counts[name], here, strict=True)]
            credit.index_add_(0, bins, record.advantages[mask].abs().double())
            tokens.index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
        edges = [k / BINS for k in range(BINS + 1)]
        whole: dict[str, Sequence[int]] = {name: [int(value) for value in values] for name, values in counts.items()}
        svg = plots.histogram(f"attention-{number}", edges, whole, axis="attention entropy Ê from …")
        found.append((f"Spectrum of Ê, {visible(label, keep_lines=True)}", "share of the tokens", svg))
        level = float(credit.sum() / tokens.sum().clamp_min(1))
        if level > 0:
            followed[label] = torch.where(tokens > 0, credit / tokens.clamp_min(1) / level, torch.nan).tolist()
    if followed:
        svg = plots.profiles("attention-credit", followed, styles, axis="attention entropy Ê, % of ln N")
        found.append(("Credit by attention entropy", "mean |Â|, 1 = average of all tokens", svg))
    return found


def _residuals(last: Last, styles: dict[str, plots.Style]) -> list[Drawn]:
    """Residuals by position, over their mean."""
    lines = _profiles(last, lambda batch: batch.adapter_residuals)
    if not lines:
        return []
    svg = plots.profiles("position-residual", lines, styles)
    return [("Adapter residual by position", "mean, 1 = average of all tokens", svg)]


def _profiles(last: Last, field: Callable[[TokenBatch], Tensor | None]) -> dict[str, Sequence[float]]:
    found: dict[str, Sequence[float]] = {}
    for label, records in last.items():
        carried = [(record.batch, field(record.batch)) for record in records]
        parts = [position_profile(value, batch.response_mask) for batch, value in carried if value is not None]
        if not parts:
            continue
        tokens = torch.stack([part.tokens for part in parts])
        totals = torch.nan_to_num(torch.stack([part.mean for part in parts])) * tokens
        level = float(totals.sum() / tokens.sum().clamp_min(1))
        if level > 0:  # before the first step an adapter moves nothing
            mean = totals.sum(0) / tokens.sum(0).clamp_min(1) / level
            found[label] = torch.where(tokens.sum(0) > 0, mean, torch.nan).tolist()
    return found
