"""`tokencredit train`: one run."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.errors import TokenCreditError
from tokencredit.progress import bar, printable, say
from tokencredit.runs import processes
from tokencredit.runs.stop import Stop

if TYPE_CHECKING:
    from tokencredit.runs.config.run_config import RunConfig
    from tokencredit.runs.plan import Plan


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "train",
        help="one run: TRL's GRPO trainer with a credit pipeline",
        description="Train as CONFIG says, in --out. The same command goes on where a killed run was.",
    )
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the resolved config, write nothing")
    parser.add_argument("--launch", choices=("torchrun",), help="train in several processes of this machine")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="number of processes; default: one per GPU of this machine"
    )
    parser.set_defaults(handler=run)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `train` and `compare` share."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; docs/configs.md lists the keys")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config, such as trainer.learning_rate=1e-4 or credit.alpha=0.3; repeatable",
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/NAME of the config file")
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
    with Stop() as stop:
        return _train(arguments, stop)


def _say_loading(what: str) -> None:
    """Show that something happens; in a log file the plan follows soon enough."""
    if processes.is_main() and sys.stderr.isatty():
        say(f"loading {what} …")


def _train(arguments: argparse.Namespace, stop: Stop) -> int:
    _say_loading("torch, transformers and TRL")
    from tokencredit.report import write_report
    from tokencredit.runs.config.load import load_config
    from tokencredit.runs.folders import read_metrics
    from tokencredit.runs.train import plan_run, train_run

    config = load_config(arguments.config, arguments.overrides)
    folder = out_folder(arguments)
    _say_loading(f"the model {config.model} and the prompts")
    if arguments.dry_run:
        return _show_dry_run(config, plan_run(config, folder), as_json=arguments.json)
    with bar("training", config.steps) if processes.is_main() else nullcontext() as advance:
        metadata = train_run(
            config,
            folder,
            progress=advance and (lambda steps, note: advance(steps, note=note)),
            show_plan=_say_plan,
            stop=stop,
        )
    if not processes.is_main():
        return 0
    report = write_report([folder], folder / "report.html")
    lines = read_metrics(folder)
    evaluations = [
        {"step": line["step"]} | {key: line["metrics"][key] for key in ("success", "reward") if key in line["metrics"]}
        for line in lines
        if line["kind"] == "eval"
    ]
    result = {
        "folder": str(folder),
        "report": str(report),
        "label": metadata["label"],
        "steps": metadata["steps"],
        "success": evaluations,
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    for evaluation in evaluations:
        values = "   ".join(f"{key} {value:.3f}" for key, value in evaluation.items() if key != "step")
        print(f"step {evaluation['step']:>6}   {values}")
    if not evaluations:
        _print_rewards(lines)
    print(f"report: {printable(report)}")
    return 0


def _print_rewards(lines: list[dict[str, Any]]) -> None:
    """Without an evaluation set the training rewards are all there is to see."""
    rewards = [(line["step"], line["metrics"]["reward"]) for line in lines if "reward" in line["metrics"]]
    print("no evaluation set (dataset.evaluation); training rewards:")
    for step, reward in [rewards[0], rewards[-1]] if len(rewards) > 1 else rewards:
        print(f"step {step:>6}   reward {reward:.3f}")


def _say_plan(plan: "Plan") -> None:
    for line in plan.text().splitlines():
        say(line)


def _show_dry_run(config: "RunConfig", plan: "Plan", *, as_json: bool) -> int:
    from tokencredit.files import dump_yaml

    if not processes.is_main():
        return 0
    if as_json:
        print(json.dumps({"plan": dict(plan.rows), "config": config.to_mapping()}))
        return 0
    _say_plan(plan)
    print(printable(dump_yaml(config.to_mapping())), end="")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """The same command in several processes; what stopped them is said here, once."""
    from tokencredit.runs.launch import default_processes, launch

    given = arguments.nproc_per_node
    same = ["train", arguments.config, *(part for item in arguments.overrides for part in ("--set", item))]
    same += ["--out", str(arguments.out)] if arguments.out else []
    same += ["--json"] if arguments.json else []
    same += ["--dry-run"] if arguments.dry_run else []
    ended = launch(same, default_processes() if given is None else given)
    if ended.code:
        print(printable(f"error: {ended.message}"), file=sys.stderr)
        if ended.hint:
            print(printable(f"hint: {ended.hint}"), file=sys.stderr)
    return ended.code
