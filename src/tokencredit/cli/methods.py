"""`tokencredit methods`: the table of methods, or one of them in full."""

import argparse
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

from tokencredit.credit import get_pipeline
from tokencredit.errors import unknown
from tokencredit.methods import estimators, presets, transforms
from tokencredit.methods.spec import MethodSpec


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
    found = {"methods": rows, "presets": dict(sorted(presets().items()))}
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
        found = _row(kind, name, steps[name]) | {"doc": inspect.getdoc(steps[name].fn)}
        print(json.dumps(found) if as_json else _text(found))
    elif name not in presets():
        raise unknown("method", name, {*steps, *presets()})
    if name in presets():
        pipeline = get_pipeline(name)
        found = {
            "kind": "preset",
            "name": name,
            "pipeline": pipeline.to_config(),
            "requires": sorted(pipeline.requires),
        }
        print(json.dumps(found) if as_json else _preset_text(found))
    return 0


def _text(found: Mapping[str, Any]) -> str:
    needs = ", ".join(found["requires"]) or "the outcome alone"
    hyperparameters = ", ".join(f"{key}={value}" for key, value in found["hyperparameters"].items()) or "(none)"
    head = f"{found['name']} ({found['kind']})\nneeds: {needs}\nhyperparameters: {hyperparameters}"
    return f"{head}\npaper: {found['paper']}\n\n{found['doc']}\n"


def _preset_text(found: Mapping[str, Any]) -> str:
    needs = ", ".join(found["requires"]) or "the outcome alone"
    return f"{found['name']} (preset)\nneeds: {needs}\npipeline: {json.dumps(found['pipeline'])}\n"


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
    console.print(table)


def _step_text(step: Any) -> str:
    if isinstance(step, str):
        return step
    (name, given), *_ = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
