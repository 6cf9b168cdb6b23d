"""`tokencredit audit`: where each method would put the credit, on the same responses, without training."""

import argparse
import json
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import parse_yaml
from tokencredit.progress import printable


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "audit",
        help="where each method would put the credit, on the same responses",
        description="Sample responses of a model on a task, or read those of a run or a file, and show token by token "
        "where several methods put the credit. Nothing is trained.",
    )
    parser.add_argument("source", nargs="?", type=Path, help="a run's folder, or a JSONL of prompts and responses")
    parser.add_argument("--model", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument("--task", metavar="TASK", help="a lab task, or gym:NAME,key=value,… of reasoning-gym")
    parser.add_argument("--credit", nargs="+", metavar="METHOD", help="presets, expressions, or inline YAML")
    parser.add_argument("--teacher", metavar="YAML", help="a teacher section; default: the model, shown the answer")
    for name, text in (
        ("prompts", "prompts; default 8"),
        ("samples", "responses per prompt; default 8"),
        ("max-tokens", "tokens of a response; default 64"),
        ("seed", "default 0"),
        ("rows-per-pass", "responses in one forward pass; default 8"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--temperature", type=float, metavar="T", help="default 1.0")
    parser.add_argument("--threshold", type=float, metavar="R", help="a response is correct above it; default 0")
    parser.add_argument("--schedule", nargs=2, type=float, metavar=("SHARE", "STEP"), help="for schedules; default 0 0")
    parser.add_argument("--device", metavar="DEVICE", help="default: a GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("audit.html"), metavar="FILE", help="default: audit.html")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    from transformers.utils import logging

    from tokencredit.audit.measure import run_audit, summary_of
    from tokencredit.report.audit_page import write_audit

    logging.disable_progress_bar()  # of weights that load
    audit = run_audit(settings_of(arguments))
    page = write_audit(audit, arguments.out)
    summary = summary_of(audit)
    if arguments.json:
        print(json.dumps(summary | {"page": str(page)}))
        return 0
    for name, value in audit.facts.items():
        print(f"{printable(name):14} {printable(value)}")
    for line in audit.warnings:
        print(f"note: {printable(line)}")
    print(f"page: {printable(page)}")
    return 0


def settings_of(arguments: argparse.Namespace) -> Any:
    """The flags as settings; what is not given keeps its default."""
    from tokencredit.audit.settings import AuditSettings

    names = ("source", "model", "task", "prompts", "samples", "max_tokens", "seed", "rows_per_pass", "temperature")
    given = {name: getattr(arguments, name) for name in (*names, "threshold", "device")}
    if arguments.source is not None and not arguments.source.exists():
        raise TokenCreditError(f"no run and no file {str(arguments.source)!r}")
    if arguments.credit is not None:
        given["credit"] = tuple(_credit(text) for text in arguments.credit)
    if arguments.teacher is not None:
        given["teacher"] = parse_yaml(arguments.teacher, "--teacher")
    if arguments.schedule is not None:
        given["schedule"] = (arguments.schedule[0], int(arguments.schedule[1]))
    return AuditSettings(**{name: value for name, value in given.items() if value is not None})


def _credit(text: str) -> Any:
    """A preset or an expression as it is; what looks like YAML is read as YAML."""
    return parse_yaml(text, "--credit") if text.lstrip().startswith(("[", "{")) else text
