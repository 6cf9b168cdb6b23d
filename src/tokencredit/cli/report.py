"""`tokencredit report RUN…`: a self-contained HTML page that opens offline."""

import argparse
import json
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "report",
        help="a self-contained HTML page of one or more runs",
        description="Write one HTML file that opens offline: results with intervals, learning curves, what the credit "
        "did in each quadrant, and responses as coloured tokens.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder that `train`, `compare` or a script with CreditGRPOTrainer wrote",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Write the page; its path goes to stdout."""
    try:
        from tokencredit.report import write_report
        from tokencredit.report.run_page.folders import load_runs
        from tokencredit.report.run_page.results import as_json, measure_of, summary
    except ImportError as error:
        raise TokenCreditError(f"the report needs {error.name}", hint="pip install 'tokencredit[trl]'") from error
    path = write_report(args.runs, args.out or args.runs[0] / "report.html")
    if not args.json:
        print(printable(path))
        return 0
    runs = load_runs(args.runs)
    content: dict[str, Any] = {
        "report": str(path),
        "measure": measure_of(runs).name,
        "results": as_json(summary(runs)),
    }
    print(json.dumps(content))
    return 0
