"""What every section of a run page draws from: the runs, the style of each method, logged numbers and last records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from markupsafe import Markup
from torch import Tensor

from tokencredit.batch.records import CreditRecord
from tokencredit.diagnostics.position import profile_sums
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.report import plots
from tokencredit.report.page import visible
from tokencredit.report.plots import Curve
from tokencredit.report.run_page.folders import Run, by_label
from tokencredit.report.run_page.results import metric_curves

Series = Mapping[str, Mapping[int, float]]  # metric name → step → number


class Picture(NamedTuple):
    """A picture, its title, the unit below the title, and the section of the page that it belongs to."""

    section: str
    title: str
    unit: str
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class PageData:
    """Runs with what their pictures need.

    * `styles`: of each label. * `credit`: the `credit/…` numbers of each run, by its identity.
    * `last`: the last record of each run of a label, for labels that have any.
    """

    runs: Sequence[Run]
    styles: Mapping[str, plots.Style]
    credit: Mapping[int, Series]
    last: Mapping[str, Sequence[CreditRecord]]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "PageData":
        """Read the records and number the styles."""
        groups = by_label(runs)
        last = {label: [run.records.read(-1) for run in group if len(run.records)] for label, group in groups.items()}
        return cls(
            runs=runs,
            styles={label: plots.style(number) for number, label in enumerate(groups)},
            credit={id(run): credit_series(run) for run in runs},
            last={label: records for label, records in last.items() if records},
        )

    def curves(self, name: str, runs: Sequence[Run] | None = None) -> list[Curve]:
        """A `credit/…` number over training, of all runs or of some."""
        return metric_curves(self.runs if runs is None else runs, lambda run: self.credit[id(run)].get(name, {}))

    def metric_pictures(self, section: str, metrics: Sequence[tuple[str, str, str, bool]]) -> list[Picture]:
        """One picture per metric that was logged: title, logged name, unit, whether it is in [0, 1] by definition."""
        pictures = []
        for title, name, unit, unit_interval in metrics:
            lines = self.curves(name)
            if lines:
                svg = plots.curves(name.replace("/", "-"), lines, self.styles, unit_interval=unit_interval)
                pictures.append(Picture(section, title, unit, svg))
        return pictures


def credit_series(run: Run) -> dict[str, dict[int, float]]:
    """The `credit/…` numbers by name and step: logged ones, or worked out from the records where none were logged."""
    series: dict[str, dict[int, float]] = {}
    for line in run.lines:
        for name, value in line.metrics.items():
            if line.kind == "train" and name.startswith("credit/"):
                series.setdefault(name, {})[line.step] = value
    if series:
        return series
    for record in run.records:
        for name, value in credit_metrics(record.batch, record.advantages, record.batch.host_advantages).items():
            series.setdefault(name, {})[record.step] = value
    return series


def pooled_profile(
    fields: Sequence[tuple[Float[Tensor, "_ _"], Bool[Tensor, "_ _"]]],
) -> tuple[Float[Tensor, " bin"], Float[Tensor, " bin"]]:
    """Mean of a quantity by position over several records (NaN where empty), and the tokens there; one vote each."""
    totals, _, tokens = torch.stack([profile_sums(values, mask) for values, mask in fields]).sum(0)
    return torch.where(tokens > 0, totals / tokens.clamp_min(1.0), torch.nan), tokens


def polarity_of(record: CreditRecord) -> Float[Tensor, "batch response"]:
    """The estimator's advantages where the record has them, else those of the whole pipeline."""
    host = record.batch.host_advantages
    return record.advantages if host is None else torch.broadcast_to(host[:, None], record.advantages.shape)


def shown_label(label: str) -> str:
    """A method's name as the title of a picture."""
    return visible(label, keep_lines=True)
