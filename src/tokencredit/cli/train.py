"""`tokencredit train`: one run."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.progress import bar
from tokencredit.runs import world


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "train",
        help="one run: TRL's GRPO trainer with a credit pipeline",
        description="Train as CONFIG says, in --out. The same command goes on where a killed run was.",
    )
    add_config_arguments(parser)
    parser.add_argument("--launch", choices=("torchrun",), help="train in several processes of this machine")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="how many; default one a GPU")
    parser.set_defaults(handler=run)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` and `compare` share."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; docs/configs.md lists the keys")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, such as trainer.learning_rate=1e-4 or credit.alpha=0.3; repeatable",
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default runs/NAME of the config's file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def out_folder(arguments: argparse.Namespace) -> Path:
    """`--out`, or a folder named after the config file."""
    return arguments.out or Path("runs") / Path(arguments.config).stem


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb."""
    if arguments.launch is not None:
        return _launch(arguments)
    if arguments.nproc_per_node is not None:
        raise TokenCreditError("`--nproc-per-node` needs `--launch`", hint="add --launch torchrun")
    from tokencredit.report.html import write_report
    from tokencredit.runs.config import load_config
    from tokencredit.runs.folders import read_metrics
    from tokencredit.runs.train import train_run

    config = load_config(arguments.config, arguments.overrides)
    folder = out_folder(arguments)
    with bar("training", int(config["steps"])) if world.is_main() else nullcontext() as advance:
        found = train_run(config, folder, progress=advance and (lambda steps, note: advance(steps, note=note)))
    if not world.is_main():
        return 0
    report = write_report([folder], folder / "report.html")
    evaluations = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    result = {
        "folder": str(folder),
        "report": str(report),
        "label": found["label"],
        "steps": found["steps"],
        "success": [{"step": line["step"], "success": line["metrics"]["success"]} for line in evaluations],
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    for line in result["success"]:
        print(f"step {line['step']:>6}   success {line['success']:.3f}")
    print(f"report: {report}")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """The same command in several processes; what stopped them is said here, once."""
    from tokencredit.runs.launch import default_processes, launch

    given = arguments.nproc_per_node
    same = ["train", arguments.config, *(part for item in arguments.overrides for part in ("--set", item))]
    same += ["--out", str(arguments.out)] if arguments.out else []
    same += ["--json"] if arguments.json else []
    ended = launch(same, default_processes() if given is None else given)
    if ended.code:
        print(f"error: {ended.message}", file=sys.stderr)
        if ended.hint:
            print(f"hint: {ended.hint}", file=sys.stderr)
    return ended.code
