"""Which pictures a run page shows, from what the runs logged and recorded."""

from collections.abc import Callable, Sequence

import numpy as np

from tokencredit.diagnostics.quadrants import ENTROPY_EDGES, entropy_histograms
from tokencredit.methods.entropy.quadrants import QUADRANTS
from tokencredit.progress import track
from tokencredit.report import plots
from tokencredit.report.plots import Curve
from tokencredit.report.run_page.data import PageData, Picture, polarity_of, pooled_profile, shown_label
from tokencredit.report.run_page.distillation import distillation_pictures
from tokencredit.report.run_page.folders import Run, by_label
from tokencredit.report.run_page.results import measure_of, metric_curves, success_curves
from tokencredit.report.run_page.signals import signal_pictures

# title, names that hosts log it under (the first that is there), unit
TRAINING = (
    ("Reward", ("reward", "rewards/mean"), "mean of the sampled responses"),
    ("Entropy", ("entropy", "credit/entropy"), "nats a token"),
    ("Length", ("completions/mean_length", "response_length", "length"), "tokens a response"),
)
# title, logged name, unit, whether it is in [0, 1] by definition
CONCENTRATION = (
    ("Gini coefficient of |Â|", "credit/gini", "0: all tokens of a response alike · 1: one token", True),
    ("Effective-token ratio", "credit/effective_token_ratio", "1: all tokens alike · 1/n: one token", True),
    ("Net advantage of a group", "credit/group_net_abs", "mean over groups of |Σ Â| a token · 0: no net push", False),
    ("Mean weight Â / base", "credit/weight/mean", "1: the size that the estimator gave", False),
)
# part of the logged name, unit, whether it is a share
QUADRANT = (
    ("tokens", "share of all tokens", True),
    ("mass", "share of all |Â|", True),
    ("entropy", "mean entropy, nats", False),
)


def pictures(data: PageData) -> list[Picture]:
    """Every picture that the runs have numbers for."""
    sections: list[Callable[[PageData], list[Picture]]] = [
        _training,
        _quadrants,
        lambda data: data.metric_pictures("concentration", CONCENTRATION),
        distillation_pictures,
        signal_pictures,
        _positions,
        _histograms,
    ]
    return [picture for section in track(sections, "drawing") for picture in section(data)]


def _training(data: PageData) -> list[Picture]:
    drawn = []
    evaluated, measure = success_curves(data.runs), measure_of(data.runs)
    if evaluated:
        svg = plots.curves("success", evaluated, data.styles, in_percent=measure.percent)
        drawn.append(Picture("training", measure.name.capitalize(), "on held-out problems", svg))
    if evaluated and not measure.percent:
        shares = metric_curves(data.runs, lambda run: run.series("eval", "success") if run.has_threshold else {})
        if shares:
            svg = plots.curves("success-share", shares, data.styles, in_percent=True)
            drawn.append(Picture("training", "Success", "share of held-out responses above the reward threshold", svg))
    for title, names, unit in TRAINING:
        lines = metric_curves(data.runs, lambda run, names=names: run.series("train", *names))
        if lines:
            drawn.append(Picture("training", title, unit, plots.curves(title.lower(), lines, data.styles)))
    return drawn


def _quadrants(data: PageData) -> list[Picture]:
    drawn = []
    for number, (label, group) in enumerate(by_label(data.runs).items()):
        for key, unit, is_share in QUADRANT:
            lines = _quadrant_curves(data, group, key)
            if lines:
                svg = plots.quadrant_lines(f"{key}-{number}", lines, in_percent=is_share)
                drawn.append(Picture("quadrants", shown_label(label), unit, svg))
    return drawn


def _quadrant_curves(data: PageData, group: Sequence[Run], key: str) -> dict[str, Curve]:
    return {quadrant: curve for quadrant in QUADRANTS for curve in data.curves(f"credit/{quadrant}/{key}", group)}


def _positions(data: PageData) -> list[Picture]:
    credit, entropy = {}, {}
    for label, records in data.last.items():
        profile = pooled_profile([(record.advantages.abs(), record.batch.response_mask) for record in records])[0]
        level = float(profile.nanmean())
        if level > 0:  # a record whose groups are all of one outcome has no credit
            credit[label] = (profile / level).tolist()
        batches = [record.batch for record in records if record.batch.entropies is not None]
        if batches:
            fields = [(batch.require("entropies"), batch.response_mask) for batch in batches]
            entropy[label] = pooled_profile(fields)[0].tolist()
    drawn = []
    if credit:
        svg = plots.profiles("position-credit", credit, data.styles)
        drawn.append(Picture("position", "Credit by position", "mean |Â|, 1 = average of the response", svg))
    if entropy:
        svg = plots.profiles("position-entropy", entropy, data.styles)
        drawn.append(Picture("position", "Entropy by position", "mean, nats", svg))
    return drawn


def _histograms(data: PageData) -> list[Picture]:
    drawn = []
    for number, (label, records) in enumerate(data.last.items()):
        measured = [record for record in records if record.batch.entropies is not None]
        if measured:
            parts = [entropy_histograms(record.batch, polarity_of(record)) for record in measured]
            counts = {name: np.sum([part[name] for part in parts], axis=0).tolist() for name in parts[0]}
            svg = plots.histogram(f"histogram-{number}", ENTROPY_EDGES, counts)
            drawn.append(Picture("histograms", shown_label(label), "share of the tokens", svg))
    return drawn
