"""`tokencredit bench`: every credit method against the exact credit and the exact gradient."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import parse_yaml, read_yaml
from tokencredit.progress import printable

FLAGS = ("prompts", "rollouts", "replicates", "seed", "resamples", "threads")


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="every method against the exact credit and the exact gradient",
        description="Sample from a model on tasks whose accepted responses can be listed, and measure how each "
        "method's credit and gradient compare with the exact ones. A killed benchmark goes on where it was.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="YAML with the keys of the benchmark's config; optional")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="lab tasks, `all`, or `module:attribute` of your own")
    parser.add_argument("--stage", nargs="+", metavar="STAGE", help="stages of the lab's model, or `all`")
    parser.add_argument("--model", metavar="FOLDER", help="a model of your own instead of the lab's")
    parser.add_argument(
        "--credit",
        nargs="+",
        metavar="METHOD",
        help="presets, expressions, or pipelines as inline YAML; default: every preset",
    )
    parser.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also measure six controls with shuffled, reversed and averaged credit; default: yes",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, such as gain=0.05 or teacher.kind=self; repeatable",
    )
    parser.add_argument("--baseline", metavar="METHOD", help="what `over baseline` compares with; default grpo")
    parser.add_argument(
        "--teacher",
        metavar="TEACHER",
        help="a stage of the lab's model, a folder, or a YAML mapping such as '{kind: self, template: trace}'",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision of the model; default float32")
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda or cuda:1")
    for name in FLAGS:
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="default: runs/bench")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    try:
        from transformers.utils import logging

        from tokencredit.bench.run import run_bench
        from tokencredit.report.bench_page import write_bench_page
    except ImportError as error:
        raise TokenCreditError(f"the benchmark needs {error.name}", hint="pip install 'tokencredit[trl]'") from error
    logging.disable_progress_bar()  # of weights that load
    results = run_bench(config_of(arguments), arguments.out)
    page = write_bench_page(results, arguments.out / "bench.html")
    if arguments.json:
        print(json.dumps(results | {"report": str(page)}))
        return 0
    for cell in results["cells"]:
        print_markdown(cell) if arguments.markdown else print_table(cell)
        print_notes(cell)
    print(f"report: {printable(page)}")
    return 0


def config_of(arguments: argparse.Namespace) -> Any:
    """The config file, then what `--set` says, then the flags."""
    from tokencredit.bench.config import BenchConfig
    from tokencredit.lab.model import STAGES
    from tokencredit.lab.tasks import TASKS

    given = {} if arguments.config is None else read_yaml(arguments.config, "config file")
    if not isinstance(given, dict):
        raise TokenCreditError(f"{arguments.config} must hold a mapping, got {type(given).__name__}")
    for item in arguments.overrides:
        _override(given, item)
    names = ("model", "dtype", "device", "baseline", "controls", *FLAGS)
    flags = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.task is not None:
        flags["tasks"] = _expand(arguments.task, TASKS)
    if arguments.stage is not None:
        flags["stages"] = _expand(arguments.stage, STAGES)
    if arguments.credit is not None:
        flags["pipelines"] = [inline_yaml(text, "--credit") for text in arguments.credit]
    if arguments.teacher is not None:
        flags["teacher"] = teacher_section(arguments.teacher, STAGES)
    return BenchConfig.read(given | flags)


def _override(given: dict[str, Any], item: str) -> None:
    """Set one `key=value`, or `key.inner=value` of a section."""
    path, equals, text = item.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise TokenCreditError(f"--set takes key=value, got {item!r}", hint="for example --set gain=0.05")
    target = given
    for key in keys[:-1]:
        inner = target.get(key)
        target[key] = dict(inner) if isinstance(inner, Mapping) else {}
        target = target[key]
    target[keys[-1]] = parse_yaml(text, f"--set {item}")


def inline_yaml(text: str, flag: str) -> Any:
    """A name or expression as it is; text that starts with `{` or `[` is YAML."""
    return parse_yaml(text, f"{flag} {text!r}") if text.lstrip().startswith(("{", "[")) else text


def teacher_section(text: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The `teacher:` section that `--teacher` stands for: a stage, a folder or name of a model, or YAML."""
    if text in stages:
        return {"kind": "model", "model": "tiny", "stage": text}
    section = inline_yaml(text, "--teacher")
    if isinstance(section, str):
        return {"kind": "model", "model": section}
    if not isinstance(section, dict):
        raise TokenCreditError(f"--teacher must be a stage, a folder or a YAML mapping, got {text!r}")
    return section


def _expand(names: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    return list(known if names == ["all"] else names)


def print_table(cell: Mapping[str, Any]) -> None:
    """Methods from best to worst direction; the page and `--markdown` show more figures."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tokencredit.report import bench_table

    title = printable(bench_table.title(cell))
    if not cell["methods"]:
        print(title)
        return
    table = Table(title=Text(title))
    columns = bench_table.TEACHER_NARROW if bench_table.has_objective(cell) else bench_table.NARROW
    for number, name in enumerate(bench_table.header(columns)):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")  # no name is cut
    for row in bench_table.table_rows(cell, columns):
        table.add_row(*(Text(printable(value)) for value in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)


def print_markdown(cell: Mapping[str, Any]) -> None:
    """The same table in markdown."""
    from tokencredit.report import bench_table

    columns = bench_table.TEACHER_COLUMNS if bench_table.has_objective(cell) else bench_table.COLUMNS
    names = bench_table.header(columns)
    rows = [names, ["---"] * len(names), *bench_table.table_rows(cell, columns)]
    print(f"\n### {printable(bench_table.title(cell))}\n")
    print("\n".join(f"| {' | '.join(printable(value).replace('|', chr(92) + '|') for value in row)} |" for row in rows))


def print_notes(cell: Mapping[str, Any]) -> None:
    """What the table does not say by itself."""
    from tokencredit.report.bench_table import notes

    for note in notes(cell):
        print(printable(note))
