"""`tokencredit compare`: methods side by side, on equal budgets, with paired seeds."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.cli.train import add_config_arguments, out_folder
from tokencredit.errors import TokenCreditError
from tokencredit.files import parse_yaml
from tokencredit.progress import printable


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "compare",
        help="runs side by side, a table with intervals, a report",
        description="Train every method with every seed as CONFIG says. A killed comparison goes on where it was.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--credit",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="presets, expressions, pipelines as inline YAML, or {credit: …, teacher: {…}}",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1 for each method; default 3")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time; default one per GPU, without a GPU one, or for lab models one per processor",
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    from tokencredit.report import write_report
    from tokencredit.runs.compare import compare_runs, plan_runs
    from tokencredit.runs.config.load import load_config
    from tokencredit.runs.stop import Stop

    for name, value in (("--seeds", arguments.seeds), ("--jobs", arguments.jobs)):
        if value is not None and value < 1:
            raise TokenCreditError(f"{name} must be at least 1, got {value}")
    credits = [parse_credit(text) for text in arguments.credit]
    config = load_config(arguments.config, arguments.overrides)
    plans = plan_runs(config, credits, range(arguments.seeds))
    folder = out_folder(arguments)
    with Stop():  # SIGTERM unwinds like Ctrl-C, so that the runs can save a checkpoint
        comparison = compare_runs(plans, folder, arguments.jobs)
    report = write_report([folder], folder / "report.html")
    if arguments.json:
        print(json.dumps(comparison | {"folder": str(folder), "report": str(report)}))
        return 0
    print_table(comparison["results"])
    for line in conclusions(comparison):
        print(printable(line))
    print(f"report: {printable(report)}")
    return 0


def parse_credit(text: str) -> Any:
    """A name or expression as it is; text that starts with `{` or `[` is YAML."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    return parse_yaml(text, f"--credit {text!r}")


def title(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table shows, and what its intervals are."""
    measure, seeds = rows[0]["measure"], rows[0]["seeds"]
    shown = "training reward (there is no evaluation set)" if measure is None else f"{measure} on held-out problems"
    if seeds == 1:
        return f"{shown}, one seed: no intervals"
    return f"{shown}, 95 % t intervals over {seeds} seeds"


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Success or mean reward at the start and the end, and the paired difference to the first method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(results))
    difference = f"end − {results[0]['label']}"
    columns = ["method", "seeds", "start", "end", difference, "training reward, last 10 steps"]
    if results[0]["measure"] is None:
        columns = ["method", "seeds", "last 10 steps", difference.removeprefix("end ")]
    for number, name in enumerate(columns):  # no label is cut, and none is read as markup
        table.add_column(_plain(name), justify="left" if number == 0 else "right", overflow="fold")
    for row in results:
        table.add_row(*(_plain(cell) for cell in _cells(row)))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["label"], str(row["seeds"])]
    if row["measure"] is None:
        return [*start, show(row["reward_interval"]), show(row["reward_difference"])]
    return [*start, *(show(row.get(name)) for name in ("start", "end", "difference")), f"{row['reward']:.3f}"]


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(printable(text))


def conclusions(comparison: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table: whether there was headroom, and how to get held-out numbers."""
    if comparison["results"][0]["measure"] is None:
        return ["hint: set dataset.evaluation (a file) or dataset.evaluation_split (a split) for held-out numbers"]
    room = comparison.get("headroom")
    if room is None:
        return []
    return [f"exact − grpo {show(room['difference'])}: {room['verdict']}"]


def show(interval: Mapping[str, float | None] | None) -> str:
    """`0.55 [0.51, 0.59]`."""
    if not interval:
        return "–"
    if interval["low"] is None:
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
