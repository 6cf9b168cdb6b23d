"""The report's section on distillation: the gap to the teacher, where it lies, the router and what its bonus moved."""

import math
from collections.abc import Sequence

from tokencredit.diagnostics.distillation import BINS, SIGNS
from tokencredit.pipeline.labels import reports_in
from tokencredit.report import plots
from tokencredit.report.plots import Curve
from tokencredit.report.run_page.data import PageData, Picture, shown_label
from tokencredit.report.run_page.folders import Run, by_label
from tokencredit.report.run_page.results import metric_curves

# title, logged name, unit, whether it lies in [0, 1] by definition
GAP = (
    ("Gap to the teacher", "credit/teacher/gap_abs", "mean |ln ρ − ln π| of the sampled tokens, nats", False),
    (
        "Share of the gap up front",
        "credit/teacher/first_share",
        "share of Σ|gap| in the first 30 % of a response",
        True,
    ),
    ("Distance from position", "credit/teacher/distance", "0: the discrepancy weight is a function of position", True),
)
# Entropy above the router's threshold is high: the arm that repels.
PARTS = {
    "PHR": ("repel", "correct"),
    "PLR": ("attract", "correct"),
    "NHR": ("repel", "wrong"),
    "NLR": ("attract", "wrong"),
}
EDGE = 0.2  # share of the logged steps that the first and the last profile average over


def distillation_pictures(data: PageData) -> list[Picture]:
    """What the runs with a teacher have numbers for; nothing without one."""
    drawn = data.metric_pictures("distillation", GAP)
    for number, edge in enumerate(("first", "last")):
        profiles = _profiles(data, last=edge == "last")
        if profiles:
            svg = plots.profiles(f"gap-position-{number}", profiles, data.styles)
            unit = f"mean |gap| by tenth, nats; {edge} fifth of the steps"
            drawn.append(Picture("distillation", f"Gap by position, {edge} steps", unit, svg))
    return drawn + _router(data)


def _router(data: PageData) -> list[Picture]:
    """Mass of the router by sign, and the bonus by arm and correctness, a picture a method."""
    drawn = []
    adding = [run for run in data.runs if adds_bonus(run)]
    mass = [curve for side in ("positive", "negative") for curve in data.curves(f"credit/router/{side}", adding)]
    if mass:
        svg = plots.curves("router-mass", mass, data.styles)
        drawn.append(Picture("distillation", "Router mass", "Σ router a token, above 0: attract, below 0: repel", svg))
    for number, (label, group) in enumerate(by_label(adding).items()):
        lines = {name: line for name, part in PARTS.items() for line in _bonus(data, group, *part)}
        if lines:
            svg = plots.quadrant_lines(f"bonus-{number}", lines, around_zero=True)
            unit = "bonus Σ(Â − base) a token, by arm and outcome"
            drawn.append(Picture("distillation", shown_label(label), unit, svg))
    return drawn


def adds_bonus(run: Run) -> bool:
    """Whether the run's pipeline adds to the verifier's advantage."""
    return reports_in("bonus", run.pipeline)


def _bonus(data: PageData, group: Sequence[Run], arm: str, verdict: str) -> list[Curve]:
    """Both signs of the gap added up."""

    def add_signs(run: Run) -> dict[int, float]:
        series = data.credit[id(run)]
        up, down = (series.get(f"credit/router/bonus_{arm}_{sign}_{verdict}", {}) for sign in SIGNS)
        return {step: up[step] + down[step] for step in up.keys() & down.keys()}

    return metric_curves(group, add_signs)


def _profiles(data: PageData, *, last: bool) -> dict[str, list[float]]:
    """Mean |gap| of each tenth over a fifth of the logged steps, all seeds."""
    profiles = {}
    for label, group in by_label(data.runs).items():
        tenths = [_mean_at_edge(data, group, f"credit/teacher/gap_abs/{k}", last=last) for k in range(BINS)]
        if not all(map(math.isnan, tenths)):
            profiles[label] = tenths
    return profiles


def _mean_at_edge(data: PageData, group: Sequence[Run], name: str, *, last: bool) -> float:
    values: list[float] = []
    for run in group:
        series = data.credit[id(run)].get(name, {})
        steps = sorted(series, reverse=last)
        values += [series[step] for step in steps[: math.ceil(EDGE * len(steps))]]
    return sum(values) / len(values) if values else math.nan
