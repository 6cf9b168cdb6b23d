"""The report's section on distillation: the gap to the teacher, where it lies, the router and what its bonus moved."""

import math
from collections.abc import Mapping, Sequence

from tokencredit.diagnostics.distillation import BINS, SIGNS
from tokencredit.pipeline.labels import reports_in
from tokencredit.report import plots
from tokencredit.report.run_page.folders import Run, by_label
from tokencredit.report.run_page.results import Curve, metric_curves
from tokencredit.report.run_page.tokens import visible

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

Credit = Mapping[int, Mapping[str, Mapping[int, float]]]  # run (by id) → metric name → step → number
Drawn = tuple[str, str, str]  # title, unit, svg


def distillation_pictures(runs: Sequence[Run], styles: dict[str, plots.Style], credit: Credit) -> list[Drawn]:
    """What the runs with a teacher have numbers for; nothing without one."""
    found: list[Drawn] = []
    for title, name, unit, share in GAP:
        lines = _curves(runs, credit, name)
        if lines:
            svg = plots.curves(name.replace("/", "-"), lines, styles, unit_interval=share)
            found.append((title, unit, svg))
    for title, last in (("Gap by position, first steps", False), ("Gap by position, last steps", True)):
        profiles = _profiles(runs, credit, last=last)
        if profiles:
            svg = plots.profiles(f"gap-position-{int(last)}", profiles, styles)
            found.append((title, f"mean |gap| by tenth, nats; {'last' if last else 'first'} fifth of the steps", svg))
    return found + _router(runs, styles, credit)


def _router(runs: Sequence[Run], styles: dict[str, plots.Style], credit: Credit) -> list[Drawn]:
    """Mass of the router by sign, and the bonus by arm and correctness, a picture a method."""
    found: list[Drawn] = []
    adding = [run for run in runs if adds_bonus(run)]
    mass = [curve for side in ("positive", "negative") for curve in _curves(adding, credit, f"credit/router/{side}")]
    if mass:
        svg = plots.curves("router-mass", mass, styles)
        found.append(("Router mass", "Σ router a token, above 0: attract, below 0: repel", svg))
    for number, (label, group) in enumerate(by_label(adding).items()):
        lines = {name: line for name, part in PARTS.items() for line in _bonus(group, credit, *part)}
        if lines:
            svg = plots.bonus_lines(f"bonus-{number}", lines)
            found.append((visible(label, keep_lines=True), "bonus Σ(Â − base) a token, by arm and outcome", svg))
    return found


def adds_bonus(run: Run) -> bool:
    """Whether the run's pipeline adds to the verifier's advantage."""
    return reports_in("bonus", run.pipeline)


def _curves(runs: Sequence[Run], credit: Credit, name: str) -> list[Curve]:
    return metric_curves(runs, lambda run: credit[id(run)].get(name, {}))


def _bonus(group: Sequence[Run], credit: Credit, arm: str, verdict: str) -> list[Curve]:
    """Both signs of the gap added up."""

    def both(run: Run) -> dict[int, float]:
        up, down = (credit[id(run)].get(f"credit/router/bonus_{arm}_{sign}_{verdict}", {}) for sign in SIGNS)
        return {step: up[step] + down[step] for step in up.keys() & down.keys()}

    return metric_curves(group, both)


def _profiles(runs: Sequence[Run], credit: Credit, *, last: bool) -> dict[str, Sequence[float]]:
    """Mean |gap| of each tenth over a fifth of the logged steps, all seeds."""
    found: dict[str, Sequence[float]] = {}
    for label, group in by_label(runs).items():
        tenths = [_at_edge(group, credit, f"credit/teacher/gap_abs/{k}", last=last) for k in range(BINS)]
        if not all(map(math.isnan, tenths)):
            found[label] = tenths
    return found


def _at_edge(group: Sequence[Run], credit: Credit, name: str, *, last: bool) -> float:
    values: list[float] = []
    for run in group:
        series = credit[id(run)].get(name, {})
        steps = sorted(series)
        count = math.ceil(EDGE * len(steps))
        values += [series[step] for step in (steps[len(steps) - count :] if last else steps[:count])]
    return sum(values) / len(values) if values else math.nan
