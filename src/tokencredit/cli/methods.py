"""`tokencredit methods`: the table of methods, or one of them in full."""

import argparse
import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import tokencredit
from tokencredit import files
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.lab.cache import cache_root

SOURCES = ("methods", "pipeline", "cli")  # folders of the package whose code decides what is printed
SECTIONS = {"methods", "presets", "aliases", "host_estimator"}
GROUPS = ("tokencredit.estimators", "tokencredit.transforms", "tokencredit.presets")


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("methods", help="the table: equation, inputs, hyperparameters, paper")
    parser.add_argument("name", nargs="?", metavar="NAME", help="an estimator, a transform or a preset")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    listing = read_listing()
    if arguments.name is not None:
        return _show_one(arguments.name, listing, as_json=arguments.json)
    rows = [{key: row[key] for key in row if key != "doc"} for row in listing["methods"]]
    steps = {name: preset["steps_as_written"] for name, preset in listing["presets"].items()}
    shown = {"methods": rows, "presets": steps, "aliases": listing["aliases"]}
    if arguments.json:
        print(json.dumps(shown))
        return 0
    _print_tables(shown)
    return 0


def read_listing() -> dict[str, Any]:
    """Describe all methods and presets; from the cache while the code is unchanged, as importing torch takes seconds.

    The file's name is a hash of the code that it was made from. With methods of other packages there is no cache.
    """
    if any(entry_points(group=group) for group in GROUPS):
        return describe_methods()
    path = cache_root() / f"methods-{_hash_sources()}.json"
    if path.is_file():
        with suppress(TokenCreditError):  # a damaged file is written again
            listing = files.read_json(path)
            if isinstance(listing, dict) and set(listing) == SECTIONS:
                return listing
    listing = describe_methods()
    with suppress(TokenCreditError):  # a cache that cannot be written changes nothing
        for old in files.make_folder(path.parent).glob("methods-*.json"):
            old.unlink(missing_ok=True)
        files.write_text(path, json.dumps(listing))
    return listing


def _hash_sources() -> str:
    package = Path(__file__).parents[1]
    digest = blake2b(tokencredit.__version__.encode(), digest_size=8)
    for path in sorted(path for folder in SOURCES for path in (package / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_methods() -> dict[str, Any]:
    """Describe every row of the tables, as JSON holds it."""
    from tokencredit.methods.table import ALIASES, HOST_ESTIMATOR, estimators, presets, transforms

    steps = {**estimators(), **transforms()}
    rows = [_describe("estimator", name, spec) for name, spec in sorted(estimators().items())]
    rows += [_describe("transform", name, spec) for name, spec in sorted(transforms().items())]
    described = {name: _describe_preset(name, written, steps) for name, written in sorted(presets().items())}
    aliases = {name: {"of": alias.of, "differs": alias.differs} for name, alias in sorted(ALIASES.items())}
    sections = {"methods": rows, "presets": described, "aliases": aliases, "host_estimator": HOST_ESTIMATOR}
    listing: dict[str, Any] = json.loads(json.dumps(sections))
    return listing


def _describe(kind: str, name: str, spec: Any) -> dict[str, Any]:
    doc = inspect.getdoc(spec.fn) or ""
    return {
        "kind": kind,
        "name": name,
        "requires": sorted(spec.required(spec.defaults)),
        "hyperparameters": spec.defaults,
        "scope": spec.scope_at(spec.defaults),
        "paper": spec.paper,
        "summary": doc.partition("\n")[0],
        "doc": doc,
    }


def _describe_preset(name: str, written: Any, steps: Mapping[str, Any]) -> dict[str, Any]:
    from tokencredit.pipeline.labels import step_names
    from tokencredit.pipeline.pipeline import get_pipeline

    pipeline = get_pipeline(name)
    names = [step for step in step_names(pipeline.to_config()) if step in steps]
    return {
        "kind": "preset",
        "name": name,
        "pipeline": pipeline.to_config(),
        "requires": sorted(pipeline.requires),
        "steps": names,
        "papers": list(dict.fromkeys(steps[step].paper for step in names)),
        "steps_as_written": written,
    }


def _show_one(name: str, listing: Mapping[str, Any], *, as_json: bool) -> int:
    methods = {row["name"]: row for row in listing["methods"]}
    presets, aliases = listing["presets"], listing["aliases"]
    if name not in {*methods, *presets, *aliases}:
        raise unknown("method", name, {*methods, *presets, *aliases})
    if name in methods:
        method = methods[name] | {"page": _page(name)}
        print(json.dumps(method) if as_json else _text(method, listing["host_estimator"]))
    alias = aliases.get(name)
    meant = name if alias is None else alias["of"]
    if meant in presets:
        preset = {key: value for key, value in presets[meant].items() if key != "steps_as_written"} | {"name": name}
        preset["page"] = _page(name, *reversed(preset["steps"]))
        if alias is not None:
            preset["alias"] = alias
        print(json.dumps(preset) if as_json else _preset_text(preset, methods))
    return 0


def _page(*names: str) -> str | None:
    """The page of a checkout that says most of a method; None where the docs are not there."""
    folder = Path(__file__).parents[3] / "docs" / "methods"
    for name in names:
        counts = {page.name: page.read_text(encoding="utf-8").count(f"`{name}`") for page in folder.glob("*.md")}
        if any(counts.values()):
            return f"docs/methods/{max(sorted(counts), key=lambda page: counts[page])}"
    return None


def _text(described: Mapping[str, Any], host_estimator: str) -> str:
    needs = ", ".join(described["requires"]) or "only the outcome"
    hyperparameters = ", ".join(f"{key}={value}" for key, value in described["hyperparameters"].items()) or "(none)"
    head = f"{described['name']} ({described['kind']})\nneeds: {needs}\nhyperparameters: {hyperparameters}"
    page = f"\npage: {described['page']}" if described["page"] else ""
    first = [described["name"]] if described["kind"] == "estimator" else [host_estimator, described["name"]]
    config = f"\nconfig: `credit: [{', '.join(first)}]`"
    return f"{head}\npaper: {described['paper']}{page}{config}\n\n{described['doc']}\n"


def _preset_text(described: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    name = described["name"]
    needs = ", ".join(described["requires"]) or "only the outcome"
    lines = [f"{name} (preset)"]
    if "alias" in described:
        lines += [f"alias of: {described['alias']['of']}; {described['alias']['differs']}"]
    lines += [f"needs: {needs}", f"pipeline: {' → '.join(_chains(described['pipeline']))}"]
    lines += [f"paper: {', '.join(described['papers'])}"]
    lines += [f"page: {described['page']}"] if described["page"] else []
    defaults = methods[described["steps"][-1]]["hyperparameters"] if described["steps"] else {}
    if defaults:
        key, value = next(iter(defaults.items()))
        text = json.dumps(value)
        lines += [f"config: `credit: {name}`, or `credit: {{{name}: {{{key}: {text}}}}}`, or --set credit.{key}={text}"]
    else:
        lines += [f"config: `credit: {name}`"]
    for step in described["steps"]:
        lines += ["", f"## {step}", "", methods[step]["doc"]]
    return "\n".join(lines) + "\n"


def _chains(pipeline: Any) -> list[str]:
    return [_step_text(step) for step in pipeline] if isinstance(pipeline, list) else [json.dumps(pipeline)]


def _print_tables(shown: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    table = Table(title="estimators and transforms")
    for column in ("name", "kind", "needs", "hyperparameters", "paper", "what it does"):
        table.add_column(column)
    for row in shown["methods"]:
        hyperparameters = " ".join(f"{key}={value}" for key, value in row["hyperparameters"].items())
        needs = ", ".join(row["requires"]) or "outcome"
        table.add_row(row["name"], row["kind"], needs, hyperparameters, row["paper"], row["summary"])
    console.print(table)
    table = Table(title="presets")
    table.add_column("name")
    table.add_column("pipeline")
    for name, steps in shown["presets"].items():
        table.add_row(name, " → ".join(_step_text(step) for step in steps))
    for name, alias in shown["aliases"].items():
        table.add_row(name, f"= {alias['of']}; {alias['differs']}")
    console.print(table)


def _step_text(step: Any) -> str:
    if isinstance(step, str):
        return step
    (name, given), *_ = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
