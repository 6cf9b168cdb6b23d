"""The page of training runs: results with intervals, curves, and what the credit did, token by token."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.methods.entropy.quadrants import QUADRANTS
from tokencredit.report import page
from tokencredit.report.run_page.data import PageData, Picture
from tokencredit.report.run_page.figures import pictures
from tokencredit.report.run_page.folders import NOT_STARTED, Run, by_label, load_runs
from tokencredit.report.run_page.results import Result, interval_scope, measure_of, summary
from tokencredit.report.run_page.signals import concentration_table
from tokencredit.report.run_page.tokens import COLOURS, PromptView, carries, prompt_views

LONG = 80  # tokens from which a response gets the whole width of the page
TITLE = 60  # characters of method names that a title may hold


def write_report(run_paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the report of the runs in `run_paths` (run or comparison folders) to `out`, and return its path.

    Runs may be unfinished and may lack evaluations, records or single fields; what they lack is left out. The file is
    whole or absent.
    """
    return page.write_page(Path(out), render(load_runs(run_paths)))


def render(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    data = PageData.of(runs)
    prompts = prompt_views(runs)
    sections: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures(data):
        sections[picture.section].append(picture)
    content = {
        "title": _title(runs),
        "runs": runs,
        "styles": data.styles,
        "quadrants": QUADRANTS,
        "rows": summary(runs),
        "measure": measure_of(runs),
        "scope": interval_scope(runs),
        "layout": _layout,
        "verdict": _verdict,
        "sections": sections,
        "prompts": prompts,
        "letters": COLOURS,
        "colours": [name for name in COLOURS if any(carries(name, prompt) for prompt in prompts)],
        "concentration": concentration_table(data),
        "settings": _settings(runs),
        "pipelines": {label: _pipeline(group) for label, group in by_label(runs).items()},
        "unfinished": [run for run in runs if run.status not in ("finished", NOT_STARTED)],
        "waiting": sum(run.status == NOT_STARTED for run in runs),
    }
    return page.render("run.html", content)


def _layout(prompts: Sequence[PromptView]) -> str:
    """How the prompts of a step are laid out: methods side by side, or one method in columns unless it is long."""
    if max(len(prompt.methods) for prompt in prompts) > 1:
        return "several"
    responses = (response for prompt in prompts for method in prompt.methods for response in method.responses)
    return "wide" if max((len(response.tokens) for response in responses), default=0) > LONG else "single"


def _title(runs: Sequence[Run]) -> str:
    tasks = list(dict.fromkeys(run.task for run in runs if run.task))
    labels = list(by_label(runs))
    names = ", ".join(labels)
    methods = names if len(names) <= TITLE else f"{len(labels)} methods"
    return f"{methods} on {', '.join(tasks)}" if tasks else methods


def _settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Setting → value, or value by label where runs differ; versions last."""
    started = [run for run in runs if run.status != NOT_STARTED]
    columns: dict[str, dict[str, list[str]]] = {}
    for run in started:
        flat = {"model": run.model, "task": run.task, **_flat(run.settings), **_flat({"versions": dict(run.versions)})}
        for key, value in flat.items():
            labels = columns.setdefault(key, {}).setdefault(_text(value), [])
            if run.label not in labels:
                labels.append(run.label)
    return [(key, _differing(values, len(by_label(started)))) for key, values in columns.items()]


def _differing(values: Mapping[str, list[str]], labels: int) -> str:
    (first, carriers), *more = values.items()
    if not more and len(carriers) == labels:
        return first
    return " · ".join(f"{value} ({', '.join(carriers)})" for value, carriers in values.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pipeline(group: Sequence[Run]) -> str:
    pipeline = next((run.pipeline for run in group if run.pipeline is not None), None)
    if isinstance(pipeline, list):
        return " → ".join(_step(step) for step in pipeline)
    return "–" if pipeline is None else _text(pipeline)


def _step(step: Any) -> str:
    if not (isinstance(step, dict) and len(step) == 1):
        return _text(step)
    ((name, options),) = step.items()
    arguments = ", ".join(f"{key}={_text(value)}" for key, value in (options or {}).items())
    return f"{name}({arguments})" if arguments else str(name)


def _verdict(row: Result) -> str:
    if row.difference is None or math.isnan(row.difference.low):
        return ""
    if row.difference.excludes_zero:
        return "better" if row.difference.mean > 0 else "worse"
    return "interval includes 0"
