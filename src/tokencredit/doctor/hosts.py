"""What a user's machine has of what the adapters rely on; every check names what it found and the fix."""

import ast
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from tokencredit.adapters.trl.checks import SUPPORTED
from tokencredit.adapters.verl import doctor as verl_doctor
from tokencredit.doctor import launchers
from tokencredit.doctor.launchers import Check, check

# What training with TRL needs, and what the lab and the reports need besides.
TRAINING = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
REPORTS = ("reasoning-gym", "matplotlib", "jinja2", "rich")

# Methods of TRL's GRPOTrainer that CreditGRPOTrainer overrides or calls, with the first arguments that it relies on.
TRL_SEAMS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
}


def diagnose(ray_worker: bool = True) -> list[Check]:
    """All checks, in the order a reader wants them; `ray_worker=False` starts no Ray (some ten seconds with verl)."""
    packages = [*(_package(name) for name in TRAINING), *(_package(name, lab=True) for name in REPORTS)]
    return [*packages, *_trl(), *verl_doctor.diagnose(ray_worker), *launchers.diagnose()]


def has_verl() -> bool:
    """Whether the checks of verl have something to check."""
    return any(True for _ in distributions(name="verl"))


def _package(name: str, *, lab: bool = False) -> Check:
    try:
        return check(name, "ok", version(name))
    except PackageNotFoundError:
        fix = "pip install 'tokencredit[trl]'"
        if lab and has_verl():  # an environment for a cluster
            return check(name, "note", "not installed; only needed for the lab and for reports", fix)
        return check(name, "fail", "not installed", fix)


def _trl() -> list[Check]:
    if importlib.util.find_spec("trl") is None:
        return []
    numbers = tuple(int(part) for part in version("trl").split(".")[:2])
    inside = SUPPORTED[0] <= numbers < SUPPORTED[1]
    checks = [
        check(
            "TRL version",
            "ok" if inside else "fail",
            f"{version('trl')}, supported >=1.5,<2",
            "" if inside else "pip install 'trl>=1.5,<2'",
        )
    ]
    methods = _methods_of_trainer()
    return checks + [_seam(methods, name, arguments) for name, arguments in TRL_SEAMS.items()]


def _methods_of_trainer() -> dict[str, tuple[str, ...]]:
    """Arguments of the methods of GRPOTrainer, read from TRL's source: importing it takes ten seconds."""
    found = importlib.util.find_spec("trl")
    folders = () if found is None else found.submodule_search_locations or ()
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
    found = methods[name][: len(arguments)]
    if found != arguments:
        return check(label, "fail", f"takes {', '.join(found)}; expected {', '.join(arguments)}", fix)
    return check(label, "ok", "takes the arguments that CreditGRPOTrainer passes")
