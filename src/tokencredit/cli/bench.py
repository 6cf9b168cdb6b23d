"""`tokencredit bench`: every credit method against the exact credit and the exact gradient."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError

FLAGS = ("prompts", "rollouts", "replicates", "seed", "resamples", "threads")
NARROW = ("direction", "direction_over_baseline", "expected_direction", "progress")
COLUMNS = (
    "direction",
    "direction_over_baseline",
    "expected_direction",
    "signal_to_noise",
    "progress",
    "rank_correlation",
    "captured",
)
TEACHER_NARROW = ("direction", "expected_direction", "teacher_direction", "teacher_sequence")
TEACHER_COLUMNS = (
    "direction",
    "expected_direction",
    "teacher_direction",
    "teacher_over_baseline",
    "teacher_expected",
    "teacher_sequence",
    "signal_to_noise",
    "progress",
)


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
    parser.add_argument("--credit", nargs="+", metavar="METHOD", help="presets or expressions; default: every preset")
    parser.add_argument("--baseline", metavar="METHOD", help="what `over baseline` compares with; default grpo")
    parser.add_argument(
        "--teacher",
        metavar="TEACHER",
        help="a stage of the lab's model, a folder, or a YAML mapping such as '{kind: self, template: trace}'",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision of the model; default float32")
    for name in FLAGS:
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="default: runs/bench")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    try:
        from tokencredit.bench.run import run_bench
        from tokencredit.report.bench_page import write_bench_page
    except ImportError as error:
        raise TokenCreditError(f"the benchmark needs {error.name}", hint="pip install 'tokencredit[trl]'") from error
    results = run_bench(config_of(arguments), arguments.out)
    page = write_bench_page(results, arguments.out / "bench.html")
    if arguments.json:
        print(json.dumps(results | {"report": str(page)}, ensure_ascii=False))
        return 0
    for cell in results["cells"]:
        print_markdown(cell) if arguments.markdown else print_table(cell)
    print(f"report: {page}")
    return 0


def config_of(arguments: argparse.Namespace) -> Any:
    """The config file, with what the flags say in its place."""
    from tokencredit.bench.config import BenchConfig
    from tokencredit.lab.model import STAGES
    from tokencredit.lab.tasks import TASKS

    given: dict[str, Any] = read_yaml(arguments.config) if arguments.config is not None else {}
    flags: dict[str, Any] = {
        "tasks": _expanded(arguments.task, TASKS),
        "stages": _expanded(arguments.stage, STAGES),
        "pipelines": arguments.credit,
        "teacher": None if arguments.teacher is None else teacher_section(arguments.teacher, STAGES),
        **{name: getattr(arguments, name) for name in ("model", "dtype", "baseline", *FLAGS)},
    }
    return BenchConfig.from_mapping(given | {name: value for name, value in flags.items() if value is not None})


def teacher_section(text: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The `teacher:` section that `--teacher` stands for: a stage, a folder or name of a model, or YAML."""
    import yaml

    if text in stages:
        return {"kind": "model", "model": "tiny", "stage": text}
    if not text.lstrip().startswith("{"):
        return {"kind": "model", "model": text}
    try:
        section = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TokenCreditError(f"--teacher is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(section, dict):
        raise TokenCreditError(f"--teacher must be a stage, a folder or a YAML mapping, got {text!r}")
    return section


def _expanded(names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str] | None:
    return list(known) if names == ["all"] else None if names is None else list(names)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenCreditError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TokenCreditError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise TokenCreditError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def print_table(cell: Mapping[str, Any]) -> None:
    """Methods from best to worst direction, and what was left out; the page and `--markdown` show more figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(cell))
    columns = TEACHER_NARROW if has_objective(cell) else NARROW
    names = header(columns)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in table_rows(cell, columns):
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)
    if cell["left_out"]:
        print(f"left out: {', '.join(sorted(cell['left_out']))} (reasons in results.json)")


def print_markdown(cell: Mapping[str, Any]) -> None:
    """The same table in markdown."""
    columns = TEACHER_COLUMNS if has_objective(cell) else COLUMNS
    names = header(columns)
    rows = [names, ["---"] * len(names), *table_rows(cell, columns)]
    print(f"\n### {title(cell)}\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def title(cell: Mapping[str, Any]) -> str:
    """What the cell measured, in one line."""
    success, sizes = cell["success"], cell["sizes"]
    text = (
        f"{cell['task']}, {cell['stage']}: success {success['exact']:.3f} exact, {success['sampled']:.3f} sampled; "
        f"{sizes['prompts']} prompts, {sizes['accepted']} accepted responses"
    )
    if not has_objective(cell):
        return text
    teacher = cell["teacher"]
    return (
        f"{text}; teacher's success {teacher['success']:.3f}, KL to it {teacher['divergence']:.3f} nats a response, "
        f"{100 * teacher['covered']:.1f} % of the state visits listed"
    )


def has_objective(cell: Mapping[str, Any]) -> bool:
    """Whether the methods were compared with the gradient of a teacher's objective."""
    return "divergence" in cell.get("teacher", {})


def header(columns: Sequence[str]) -> list[str]:
    """Names of the columns."""
    return ["method", *(name.replace("_", " ") for name in columns), "direction, mass matched"]


def table_rows(cell: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """One row a method, best direction first; its mass-matched twin gives the last column."""
    plain = [method for method in cell["methods"] if not method["matched"]]
    matched = {method["name"]: method["figures"]["direction"] for method in cell["methods"] if method["matched"]}
    ranked = sorted(plain, key=lambda method: -(method["figures"]["direction"][0] or 0.0))
    return [
        [
            method["name"],
            *(show(method["figures"].get(name)) for name in columns),
            show(matched[method["name"]]) if method["name"] in matched else "same",
        ]
        for method in ranked
    ]


def show(estimate: Sequence[float | None] | None) -> str:
    """`0.55 [0.51, 0.59]`."""
    if estimate is None or estimate[0] is None:
        return "–"
    value, low, high = estimate
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
