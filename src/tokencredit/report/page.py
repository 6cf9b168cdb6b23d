"""The report: one HTML file that opens offline. Everything that came from a model or a run is escaped."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokencredit.diagnostics.bootstrap import Interval
from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_bytes
from tokencredit.methods.entropy.quadrants import QUADRANTS
from tokencredit.report import plots
from tokencredit.report.run_page.figures import last_records, pictures
from tokencredit.report.run_page.folders import NOT_STARTED, Run, by_label, load_runs
from tokencredit.report.run_page.results import Result, interval_over, measure_of, summary
from tokencredit.report.run_page.signals import concentration_table
from tokencredit.report.run_page.tokens import COLOURS, PromptView, carries, prompt_views, visible

LONG = 80  # tokens from which a response gets the whole width of the page
TITLE = 60  # characters of method names that a title may hold


def write_report(run_paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the report of the runs in `run_paths` (run or comparison folders) to `out`, and return its path.

    Runs may be unfinished and may lack evaluations, records or single fields; what they lack is left out. The file is
    written to a temporary name and renamed.
    """
    runs = load_runs(run_paths)
    path = Path(out)
    if path.is_dir():
        raise TokenCreditError(f"{path} is a folder", hint="name a file, such as report.html")
    text = render(runs)
    make_folder(path.parent)
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))  # a lone surrogate is not UTF-8
    return path


def render(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    labels = list(by_label(runs))
    prompts = prompt_views(runs)
    latest = {label: last_records(group) for label, group in by_label(runs).items()}
    styles = {label: plots.style(number) for number, label in enumerate(labels)}
    sections: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for picture in pictures(runs, styles):
        # Our own drawing of numbers: no text of a run is in it. The only thing that is not escaped here.
        sections[picture.section].append({**picture._asdict(), "svg": Markup(picture.svg)})
    environment = Environment(
        loader=PackageLoader("tokencredit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": _shown, "interval": _interval, "number": _number, "percent": _percent}
    return environment.get_template("report.html").render(
        title=_title(runs),
        runs=runs,
        styles=styles,
        quadrants=QUADRANTS,
        rows=summary(runs),
        measure=measure_of(runs),
        over=interval_over(runs),
        layout=_layout,
        verdict=_verdict,
        sections=sections,
        prompts=prompts,
        letters=COLOURS,
        colours=[name for name in COLOURS if any(carries(name, prompt) for prompt in prompts)],
        concentration=concentration_table(runs, latest),
        settings=_settings(runs),
        pipelines={label: _pipeline(group) for label, group in by_label(runs).items()},
        unfinished=[run for run in runs if run.status not in ("finished", NOT_STARTED)],
        waiting=sum(run.status == NOT_STARTED for run in runs),
    )


def _layout(prompts: Sequence[PromptView]) -> str:
    """How the prompts of a step stand on the page: methods side by side, or one method in columns unless it is long."""
    if max(len(prompt.methods) for prompt in prompts) > 1:
        return "several"
    responses = (response for prompt in prompts for method in prompt.methods for response in method.responses)
    return "wide" if max((len(response.tokens) for response in responses), default=0) > LONG else "single"


def _title(runs: Sequence[Run]) -> str:
    tasks = list(dict.fromkeys(run.task for run in runs if run.task))
    labels = list(by_label(runs))
    named = ", ".join(labels)
    methods = named if len(named) <= TITLE else f"{len(labels)} methods"
    return f"{methods} on {', '.join(tasks)}" if tasks else methods


def _settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Setting → value, or value by label where runs differ; versions last."""
    started = [run for run in runs if run.status != NOT_STARTED]
    columns: dict[str, dict[str, list[str]]] = {}
    for run in started:
        flat = {"model": run.model, "task": run.task, **_flat(run.settings), **_flat({"versions": dict(run.versions)})}
        for key, value in flat.items():
            values = columns.setdefault(key, {}).setdefault(_text(value), [])
            if run.label not in values:
                values.append(run.label)
    return [(key, _differing(values, len(by_label(started)))) for key, values in columns.items()]


def _differing(values: Mapping[str, list[str]], labels: int) -> str:
    (first, carriers), *more = values.items()
    if not more and len(carriers) == labels:
        return first
    return " · ".join(f"{value} ({', '.join(carriers)})" for value, carriers in values.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pipeline(group: Sequence[Run]) -> str:
    found = next((run.pipeline for run in group if run.pipeline is not None), None)
    if not isinstance(found, list):
        return "–" if found is None else _text(found)
    return " → ".join(_step(step) for step in found)


def _step(step: Any) -> str:
    if not (isinstance(step, dict) and len(step) == 1):
        return _text(step)
    ((name, given),) = step.items()
    arguments = ", ".join(f"{key}={_text(value)}" for key, value in (given or {}).items())
    return f"{name}({arguments})" if arguments else str(name)


def _shown(text: object) -> str:
    return visible(str(text), keep_lines=True)


def _number(value: float | None, digits: int = 3) -> str:
    """A number with a real minus sign, to four decimals at most; a dash for what does not exist."""
    if value is None or math.isnan(value):
        return "–"
    short = f"{value:.{digits}g}" if abs(value) >= 0.01 else f"{value:.4f}".rstrip("0").rstrip(".")
    return ("0" if short == "-0" else short).replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def _interval(value: Interval | None, percent: bool = True, signed: bool = False) -> str:
    """A value with its interval: 41.2 [38.0, 44.5]."""
    if value is None or math.isnan(value.mean):
        return "–"
    write = _percent if percent else partial(_number, digits=4)
    plus = "+" if signed and value.mean > 0 else ""
    if math.isnan(value.low):
        return f"{plus}{write(value.mean)}"
    return f"{plus}{write(value.mean)} [{write(value.low)}, {write(value.high)}]"


def _verdict(row: Result) -> str:
    if row.difference is None or math.isnan(row.difference.low):
        return ""
    if row.difference.excludes_zero:
        return "better" if row.difference.mean > 0 else "worse"
    return "interval includes 0"
