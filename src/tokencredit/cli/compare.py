"""`tokencredit compare`: methods side by side, on equal budgets, with paired seeds."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.cli.train import add_config_arguments, out_folder
from tokencredit.errors import TokenCreditError


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "compare",
        help="runs side by side, a table with intervals, a report",
        description="Train every method with every seed as CONFIG says. A killed comparison goes on where it was.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--credit", nargs="+", required=True, metavar="METHOD", help="presets, expressions, or pipelines as inline YAML"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1 for each method; default 3")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: the processors")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    from tokencredit.report.html import write_report
    from tokencredit.runs.compare import compare_runs, plan_runs
    from tokencredit.runs.config import load_config

    for name, value in (("--seeds", arguments.seeds), ("--jobs", arguments.jobs)):
        if value is not None and value < 1:
            raise TokenCreditError(f"{name} must be at least 1, got {value}")
    credits = [parse_credit(text) for text in arguments.credit]
    config = load_config(arguments.config, arguments.overrides)
    plans = plan_runs(config, credits, range(arguments.seeds))
    folder = out_folder(arguments)
    found = compare_runs(plans, folder, arguments.jobs)
    report = write_report([folder], folder / "report.html")
    if arguments.json:
        print(json.dumps(found | {"folder": str(folder), "report": str(report)}))
        return 0
    print_table(found["results"])
    print(f"report: {report}")
    return 0


def parse_credit(text: str) -> Any:
    """A name or expression as it is; text that starts with `{` or `[` is YAML."""
    import yaml

    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TokenCreditError(f"--credit {text!r} is no YAML: {' '.join(str(error).split())}") from error


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Success at the start and the end, and the paired difference to the first method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="success on held-out problems, 95 % bootstrap intervals over seeds and problems")
    columns = ("method", "seeds", "start", "end", f"end − {results[0]['label']}", "training reward, last 10 steps")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")  # no label is cut
    for row in results:
        cells = [show(row.get(name)) for name in ("start", "end", "difference")]
        table.add_row(row["label"], str(row["seeds"]), *cells, f"{row['reward']:.3f}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def show(found: Mapping[str, float | None] | None) -> str:
    """`0.55 [0.51, 0.59]`."""
    if not found:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
