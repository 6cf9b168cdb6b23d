"""`tokencredit methods`: the table of methods, or one of them in full."""

import argparse
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.errors import unknown
from tokencredit.methods.spec import MethodSpec
from tokencredit.methods.table import ALIASES, HOST_ESTIMATOR, estimators, find_preset, presets, transforms
from tokencredit.pipeline.labels import step_names
from tokencredit.pipeline.pipeline import get_pipeline


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("methods", help="the table: equation, inputs, hyperparameters, paper")
    parser.add_argument("name", nargs="?", metavar="NAME", help="an estimator, a transform or a preset")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    if arguments.name is not None:
        return _show_one(arguments.name, as_json=arguments.json)
    rows = [_row("estimator", name, spec) for name, spec in sorted(estimators().items())]
    rows += [_row("transform", name, spec) for name, spec in sorted(transforms().items())]
    aliases = {name: {"of": alias.of, "differs": alias.differs} for name, alias in sorted(ALIASES.items())}
    found = {"methods": rows, "presets": dict(sorted(presets().items())), "aliases": aliases}
    if arguments.json:
        print(json.dumps(found))
        return 0
    _print_tables(found)
    return 0


def _row(kind: str, name: str, spec: MethodSpec) -> dict[str, Any]:
    summary = (inspect.getdoc(spec.fn) or "").partition("\n")[0]
    return {
        "kind": kind,
        "name": name,
        "requires": sorted(spec.required(spec.defaults)),
        "hyperparameters": spec.defaults,
        "scope": spec.scope_at(spec.defaults),
        "paper": spec.paper,
        "summary": summary,
    }


def _show_one(name: str, *, as_json: bool) -> int:
    steps = {**estimators(), **transforms()}
    if name in steps:
        kind = "estimator" if name in estimators() else "transform"
        described = _row(kind, name, steps[name]) | {"doc": inspect.getdoc(steps[name].fn), "page": _page(name)}
        print(json.dumps(described) if as_json else _text(described))
    elif find_preset(name) is None:
        raise unknown("method", name, {*steps, *presets(), *ALIASES})
    if find_preset(name) is not None:
        described = _preset(name, steps)
        print(json.dumps(described) if as_json else _preset_text(described, steps))
    return 0


def _preset(name: str, steps: Mapping[str, MethodSpec]) -> dict[str, Any]:
    pipeline = get_pipeline(name)
    names = [step for step in step_names(pipeline.to_config()) if step in steps]
    return {
        "kind": "preset",
        "name": name,
        "pipeline": pipeline.to_config(),
        "requires": sorted(pipeline.requires),
        "steps": names,
        "papers": list(dict.fromkeys(steps[step].paper for step in names)),
        "page": _page(name, *reversed(names)),
    }


def _page(*names: str) -> str | None:
    """The page of a checkout that says most of a method; None where the docs are not there."""
    folder = Path(__file__).parents[3] / "docs" / "methods"
    for name in names:
        counts = {page.name: page.read_text(encoding="utf-8").count(f"`{name}`") for page in folder.glob("*.md")}
        if any(counts.values()):
            return f"docs/methods/{max(sorted(counts), key=lambda page: counts[page])}"
    return None


def _text(described: Mapping[str, Any]) -> str:
    needs = ", ".join(described["requires"]) or "only the outcome"
    hyperparameters = ", ".join(f"{key}={value}" for key, value in described["hyperparameters"].items()) or "(none)"
    head = f"{described['name']} ({described['kind']})\nneeds: {needs}\nhyperparameters: {hyperparameters}"
    page = f"\npage: {described['page']}" if described["page"] else ""
    first = [described["name"]] if described["kind"] == "estimator" else [HOST_ESTIMATOR, described["name"]]
    config = f"\nconfig: `credit: [{', '.join(first)}]`"
    return f"{head}\npaper: {described['paper']}{page}{config}\n\n{described['doc']}\n"


def _preset_text(described: Mapping[str, Any], steps: Mapping[str, MethodSpec]) -> str:
    name = described["name"]
    needs = ", ".join(described["requires"]) or "only the outcome"
    lines = [f"{name} (preset)"]
    if name in ALIASES:
        lines += [f"alias of: {ALIASES[name].of}; {ALIASES[name].differs}"]
    lines += [f"needs: {needs}", f"pipeline: {' → '.join(_chains(described['pipeline']))}"]
    lines += [f"paper: {', '.join(described['papers'])}"]
    lines += [f"page: {described['page']}"] if described["page"] else []
    defaults = steps[described["steps"][-1]].defaults if described["steps"] else {}
    if defaults:
        key, value = next(iter(defaults.items()))
        shown = json.dumps(value)
        lines += [
            f"config: `credit: {name}`, or `credit: {{{name}: {{{key}: {shown}}}}}`, or --set credit.{key}={shown}"
        ]
    else:
        lines += [f"config: `credit: {name}`"]
    for step in described["steps"]:
        lines += ["", f"## {step}", "", inspect.getdoc(steps[step].fn) or ""]
    return "\n".join(lines) + "\n"


def _chains(pipeline: Any) -> list[str]:
    return [_step_text(step) for step in pipeline] if isinstance(pipeline, list) else [json.dumps(pipeline)]


def _print_tables(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    table = Table(title="estimators and transforms")
    for column in ("name", "kind", "needs", "hyperparameters", "paper", "what it does"):
        table.add_column(column)
    for row in found["methods"]:
        hyperparameters = " ".join(f"{key}={value}" for key, value in row["hyperparameters"].items())
        needs = ", ".join(row["requires"]) or "outcome"
        table.add_row(row["name"], row["kind"], needs, hyperparameters, row["paper"], row["summary"])
    console.print(table)
    table = Table(title="presets")
    table.add_column("name")
    table.add_column("pipeline")
    for name, steps in found["presets"].items():
        table.add_row(name, " → ".join(_step_text(step) for step in steps))
    for name, alias in found["aliases"].items():
        table.add_row(name, f"= {alias['of']}; {alias['differs']}")
    console.print(table)


def _step_text(step: Any) -> str:
    if isinstance(step, str):
        return step
    (name, given), *_ = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
