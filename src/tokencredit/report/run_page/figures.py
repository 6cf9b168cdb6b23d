"""Which pictures a report shows, from what the runs logged and recorded."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokencredit.batch.records import CreditRecord
from tokencredit.diagnostics.position import position_profile
from tokencredit.diagnostics.quadrants import ENTROPY_EDGES, entropy_histograms
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.methods.entropy.quadrants import QUADRANTS
from tokencredit.progress import track
from tokencredit.report import plots
from tokencredit.report.run_page.distillation import distillation_pictures
from tokencredit.report.run_page.folders import Run, by_label
from tokencredit.report.run_page.results import Curve, measure_of, metric_curves, success_curves
from tokencredit.report.run_page.signals import signal_pictures
from tokencredit.report.run_page.tokens import polarity_of, visible

# title, names that hosts log it under (the first that is there), unit
TRAINING = (
    ("Reward", ("reward", "rewards/mean"), "mean of the sampled responses"),
    ("Entropy", ("entropy", "credit/entropy"), "nats a token"),
    ("Length", ("completions/mean_length", "response_length", "length"), "tokens a response"),
)
# title, logged name, unit, whether it lies in [0, 1] by definition
CONCENTRATION = (
    ("Gini coefficient of |Â|", "credit/gini", "0: all tokens of a response alike · 1: one token", True),
    ("Effective-token ratio", "credit/effective_token_ratio", "1: all tokens alike · 1/n: one token", True),
    ("Net advantage of a group", "credit/group_net_abs", "mean over groups of |Σ Â| a token · 0: no net push", False),
    ("Mean weight Â / base", "credit/weight/mean", "1: the size that the estimator gave", False),
)
QUADRANT = (
    ("tokens", "share of all tokens", True),
    ("mass", "share of all |Â|", True),
    ("entropy", "mean entropy, nats", False),
)


class Picture(NamedTuple):
    """A picture, its title, the unit below the title, and the section of the page it belongs to."""

    section: str
    title: str
    unit: str
    svg: str


Styles = dict[str, plots.Style]
Credit = dict[int, dict[str, dict[int, float]]]  # run (by id) → metric name → step → number


def pictures(runs: Sequence[Run], styles: Styles) -> list[Picture]:
    """Every picture that the runs have numbers for."""
    credit = {id(run): credit_series(run) for run in runs}
    last = {label: last_records(group) for label, group in by_label(runs).items()}
    last = {label: records for label, records in last.items() if records}
    parts: list[Callable[[], list[Picture]]] = [
        lambda: _training(runs, styles),
        lambda: _quadrants(runs, credit),
        lambda: _concentration(runs, styles, credit),
        lambda: [Picture("distillation", *drawn) for drawn in distillation_pictures(runs, styles, credit)],
        lambda: [Picture("signals", *drawn) for drawn in signal_pictures(runs, styles, last)],
        lambda: _positions(last, styles),
        lambda: _histograms(last),
    ]
    return [picture for part in track(parts, "drawing") for picture in part()]


def credit_series(run: Run) -> dict[str, dict[int, float]]:
    """The `credit/…` numbers by name and step: logged ones, or worked out from the records where none were logged."""
    found: dict[str, dict[int, float]] = {}
    for line in run.lines:
        for name, value in line.metrics.items():
            if line.kind == "train" and name.startswith("credit/"):
                found.setdefault(name, {})[line.step] = value
    if found:
        return found
    for record in run.records:
        for name, value in credit_metrics(record.batch, record.advantages, record.batch.host_advantages).items():
            found.setdefault(name, {})[record.step] = value
    return found


def last_records(runs: Sequence[Run]) -> list[CreditRecord]:
    """The last record of each run that has any."""
    return [run.records.read(-1) for run in runs if len(run.records)]


def _training(runs: Sequence[Run], styles: Styles) -> list[Picture]:
    found = []
    evaluated, measure = success_curves(runs), measure_of(runs)
    if evaluated:
        svg = plots.curves("success", evaluated, styles, percent=measure.percent)
        found.append(Picture("training", measure.name.capitalize(), "on held-out problems", svg))
    if evaluated and not measure.percent:
        shares = metric_curves(runs, lambda run: run.series("eval", "success") if run.has_threshold else {})
        if shares:
            svg = plots.curves("success-share", shares, styles, percent=True)
            found.append(Picture("training", "Success", "share of held-out responses above the reward threshold", svg))
    for title, names, unit in TRAINING:
        lines = metric_curves(runs, lambda run, names=names: run.series("train", *names))
        if lines:
            found.append(Picture("training", title, unit, plots.curves(title.lower(), lines, styles)))
    return found


def _quadrants(runs: Sequence[Run], credit: Credit) -> list[Picture]:
    found = []
    for number, (label, group) in enumerate(by_label(runs).items()):
        for key, unit, percent in QUADRANT:
            lines = _per_quadrant(group, credit, key)
            if lines:
                svg = plots.quadrant_lines(f"{key}-{number}", lines, percent=percent)
                found.append(Picture("quadrants", visible(label, keep_lines=True), unit, svg))
    return found


def _per_quadrant(group: Sequence[Run], credit: Credit, key: str) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for quadrant in QUADRANTS:
        name = f"credit/{quadrant}/{key}"
        for curve in metric_curves(group, lambda run, name=name: credit[id(run)].get(name, {})):
            found[quadrant] = curve
    return found


def _concentration(runs: Sequence[Run], styles: Styles, credit: Credit) -> list[Picture]:
    found = []
    for title, name, unit, share in CONCENTRATION:
        lines = metric_curves(runs, lambda run, name=name: credit[id(run)].get(name, {}))
        if lines:
            svg = plots.curves(name.replace("/", "-"), lines, styles, unit_interval=share)
            found.append(Picture("concentration", title, unit, svg))
    return found


def _positions(last: Mapping[str, Sequence[CreditRecord]], styles: Styles) -> list[Picture]:
    credit, entropy = {}, {}
    for label, records in last.items():
        profile = _pooled([position_profile(r.advantages.abs(), r.batch.response_mask) for r in records])
        level = float(np.nansum(profile)) / max(int(np.isfinite(profile).sum()), 1)
        if level > 0:  # a record whose groups are all of one outcome has no credit
            credit[label] = (profile / level).tolist()
        with_entropy = [r for r in records if r.batch.entropies is not None]
        if with_entropy:
            found = [position_profile(r.batch.require("entropies"), r.batch.response_mask) for r in with_entropy]
            entropy[label] = _pooled(found).tolist()
    pictures = []
    if credit:
        svg = plots.profiles("position-credit", credit, styles)
        pictures.append(Picture("position", "Credit by position", "mean |Â|, 1 = average of the response", svg))
    if entropy:
        svg = plots.profiles("position-entropy", entropy, styles)
        pictures.append(Picture("position", "Entropy by position", "mean, nats", svg))
    return pictures


def _pooled(profiles: Sequence) -> np.ndarray:
    """Profiles of several records as one: every token has one vote."""
    tokens = np.stack([profile.tokens.cpu().numpy() for profile in profiles])
    means = np.stack([profile.mean.cpu().numpy() for profile in profiles])
    count = tokens.sum(0)
    return np.where(count > 0, np.nansum(means * tokens, 0) / np.maximum(count, 1), np.nan)


def _histograms(last: Mapping[str, Sequence[CreditRecord]]) -> list[Picture]:
    found = []
    for number, (label, records) in enumerate(last.items()):
        per_record = [entropy_histograms(r.batch, polarity_of(r)) for r in records if r.batch.entropies is not None]
        if per_record:
            counts = {name: np.sum([counts[name] for counts in per_record], axis=0).tolist() for name in per_record[0]}
            svg = plots.histogram(f"histogram-{number}", ENTROPY_EDGES, counts)
            found.append(Picture("histograms", visible(label, keep_lines=True), "share of the tokens", svg))
    return found
