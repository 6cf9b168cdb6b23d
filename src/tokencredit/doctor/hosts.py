"""TRL and verl: whether the installed versions have what the adapters override and call."""

import ast
import importlib.util
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tokencredit.adapters.trl.checks import SUPPORTED
from tokencredit.adapters.verl import doctor as verl_doctor
from tokencredit.doctor.check import Check, check

# Methods of TRL's GRPOTrainer that CreditGRPOTrainer overrides or calls, with the first arguments that it relies on.
TRL_SEAMS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
}


def diagnose(ray_worker: bool = True) -> list[Check]:
    """The checks of both hosts, those that are installed."""
    return [*_trl(), *verl_doctor.diagnose(ray_worker)]


def _trl() -> list[Check]:
    if importlib.util.find_spec("trl") is None:
        return []
    methods = _methods_of_trainer()
    return [_trl_version(), *(_seam(methods, name, arguments) for name, arguments in TRL_SEAMS.items())]


def _trl_version() -> Check:
    text = version("trl")
    numbers = tuple(int(part) for part in text.split(".")[:2])
    if SUPPORTED[0] <= numbers < SUPPORTED[1]:
        return check("TRL version", "ok", f"{text}, supported >=1.5,<2")
    return check("TRL version", "fail", f"{text}, supported >=1.5,<2", "pip install 'trl>=1.5,<2'")


def _methods_of_trainer() -> dict[str, tuple[str, ...]]:
    """Arguments of the methods of GRPOTrainer, read from TRL's source: importing it takes ten seconds."""
    package = importlib.util.find_spec("trl")
    folders = () if package is None else package.submodule_search_locations or ()
    for folder in folders:
        path = Path(folder) / "trainer" / "grpo_trainer.py"
        if path.is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GRPOTrainer")
            return {
                method.name: tuple(argument.arg for argument in (*method.args.posonlyargs, *method.args.args)[1:])
                for node in classes
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            }
    return {}


def _seam(methods: Mapping[str, tuple[str, ...]], name: str, arguments: tuple[str, ...]) -> Check:
    """Whether this TRL has a method that the credit trainer replaces, with the arguments that it passes."""
    label, fix = f"TRL's GRPOTrainer.{name}", "pip install trl==1.16.0, which CreditGRPOTrainer was checked with"
    if name not in methods:
        return check(label, "fail", "missing in this version of TRL", fix)
    present = methods[name][: len(arguments)]
    if present != arguments:
        return check(label, "fail", f"takes {', '.join(present)}; expected {', '.join(arguments)}", fix)
    return check(label, "ok", "takes the arguments that CreditGRPOTrainer passes")
