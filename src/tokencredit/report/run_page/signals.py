"""The report's section on token signals: how concentrated each one is, and where entropies and residuals lie."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.concentration import effective_token_ratio, gini, mean_over_responses
from tokencredit.methods.likelihood import entropy_drops, score_weights
from tokencredit.pipeline.labels import reports_in
from tokencredit.report import plots
from tokencredit.report.run_page.data import PageData, Picture, polarity_of, pooled_profile, shown_label
from tokencredit.report.run_page.folders import Run
from tokencredit.report.run_page.results import metric_curves

SHOWN = 12  # records of a run that the curves read, evenly spaced
BINS = 10  # of the spectrum, over [0, 1]


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


def concentration_table(data: PageData) -> list[Concentration]:
    """One row a method and signal, from the last record of each run; nothing where no method weighs by a signal."""
    if not _weigh_by_signal(data.runs):
        return []
    rows = []
    for label, records in data.last.items():
        carried = [(record.batch, signals_of(record.batch)) for record in records]
        for signal in dict.fromkeys(name for _, signals in carried for name in signals):
            numbers = [_concentration(batch, signals[signal]) for batch, signals in carried if signal in signals]
            means = [sum(column) / len(column) for column in zip(*numbers, strict=True)]
            rows.append(Concentration(label, signal, *means))
    return rows


def signal_pictures(data: PageData) -> list[Picture]:
    """Concentration of each signal over training, the spectrum of attention entropy, and what credit follows it."""
    drawn = []
    series = {id(run): _over_training(run) for run in data.runs} if _weigh_by_signal(data.runs) else {}
    for signal in dict.fromkeys(name for of_run in series.values() for name in of_run):
        lines = metric_curves(data.runs, lambda run, signal=signal: series[id(run)].get(signal, {}))
        svg = plots.curves(f"signal-{signal.replace(' ', '-')}", lines, data.styles, unit_interval=True)
        title = f"Gini coefficient of the {signal}"
        drawn.append(Picture("signals", title, "of the signal, not of the credit; p = 1", svg))
    return drawn + _spectra(data) + _residuals(data)


def _weigh_by_signal(runs: Sequence[Run]) -> bool:
    return any(reports_in("signals", run.pipeline) for run in runs)


def _concentration(batch: TokenBatch, scores: Tensor) -> tuple[float, float, float, float]:
    mask = batch.response_mask
    plain, sharp = (score_weights(chosen(scores, mask), mask, sharpening=sharpening) for sharpening in (1.0, 2.0))
    return (
        mean_over_responses(gini(plain, mask)).value,
        mean_over_responses(effective_token_ratio(plain, mask)).value,
        mean_over_responses(gini(sharp, mask)).value,
        mean_over_responses(effective_token_ratio(sharp, mask)).value,
    )


def _over_training(run: Run) -> dict[str, dict[int, float]]:
    """Signal → step → Gini coefficient at p = 1."""
    count = len(run.records)
    picked = sorted({round(k * (count - 1) / max(SHOWN - 1, 1)) for k in range(SHOWN)}) if count else []
    found: dict[str, dict[int, float]] = {}
    for number in picked:
        record = run.records.read(number)
        for signal, scores in signals_of(record.batch).items():
            value = _concentration(record.batch, scores)[0]
            if not math.isnan(value):
                found.setdefault(signal, {})[record.step] = value
    return found


def _spectra(data: PageData) -> list[Picture]:
    """How the tokens of each polarity spread over Ê, and the credit of each tenth of Ê."""
    drawn, followed = [], {}
    for number, (label, records) in enumerate(data.last.items()):
        carried = [record for record in records if record.batch.attention_entropies is not None]
        if not carried:
            continue
        counts = torch.zeros(3, BINS, dtype=torch.long)  # positive, negative and no polarity
        credit = torch.zeros(BINS, dtype=torch.float64)
        for record in carried:
            mask = record.batch.response_mask
            bins = (record.batch.require("attention_entropies")[mask] * BINS).long().clamp(0, BINS - 1)
            polarity = polarity_of(record)[mask]
            sides = (polarity > 0, polarity < 0, polarity == 0)
            counts += torch.stack([torch.bincount(bins[side], minlength=BINS) for side in sides])
            credit.index_add_(0, bins, record.advantages[mask].abs().double())
        edges = [k / BINS for k in range(BINS + 1)]
        shares = dict(zip(("positive", "negative", "none"), counts.tolist(), strict=True))
        svg = plots.histogram(f"attention-{number}", edges, shares, axis="attention entropy Ê from …")
        drawn.append(Picture("signals", f"Spectrum of Ê, {shown_label(label)}", "share of the tokens", svg))
        tokens = counts.sum(0)
        level = float(credit.sum() / tokens.sum().clamp_min(1))
        if level > 0:
            followed[label] = torch.where(tokens > 0, credit / tokens.clamp_min(1) / level, torch.nan).tolist()
    if followed:
        svg = plots.profiles("attention-credit", followed, data.styles, axis="attention entropy Ê, % of ln N")
        unit = "mean |Â|, 1 = average of all tokens"
        drawn.append(Picture("signals", "Credit by attention entropy", unit, svg))
    return drawn


def _residuals(data: PageData) -> list[Picture]:
    """Residuals by position, over their mean."""
    lines = {}
    for label, records in data.last.items():
        batches = [record.batch for record in records if record.batch.adapter_residuals is not None]
        if not batches:
            continue
        fields = [(batch.require("adapter_residuals"), batch.response_mask) for batch in batches]
        profile, tokens = pooled_profile(fields)
        level = float((profile.nan_to_num() * tokens).sum() / tokens.sum().clamp_min(1))
        if level > 0:  # before the first step an adapter moves nothing
            lines[label] = (profile / level).tolist()
    if not lines:
        return []
    svg = plots.profiles("position-residual", lines, data.styles)
    return [Picture("signals", "Adapter residual by position", "mean, 1 = average of all tokens", svg)]
