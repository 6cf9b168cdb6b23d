"""What a user's machine has of what the adapters rely on; every check names what it found and the fix."""

import importlib.util
import inspect
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from tokencredit.adapters.trl_checks import SUPPORTED

Check = dict[str, str]
Status = Literal["ok", "fail", "note"]

# Packages of the command line and the versions that the suite runs with.
NEEDED = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "reasoning-gym",
    "matplotlib",
    "jinja2",
    "rich",
)

# Methods of GRPOTrainer that CreditGRPOTrainer overrides, with the first arguments that it relies on.
TRL_SEAMS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
}


def diagnose() -> list[Check]:
    """All checks, in the order a reader wants them."""
    packages = [_package(name) for name in NEEDED]
    return [*packages, *_trl(), _verl(), _devices(), _launcher()]


def _check(name: str, status: Status, found: str, fix: str = "") -> Check:
    return {"name": name, "status": status, "found": found, "fix": fix}


def _package(name: str) -> Check:
    try:
        return _check(name, "ok", version(name))
    except PackageNotFoundError:
        return _check(name, "fail", "not installed", "pip install 'tokencredit[trl]'")


def _trl() -> list[Check]:
    if importlib.util.find_spec("trl") is None:
        return []
    numbers = tuple(int(part) for part in version("trl").split(".")[:2])
    inside = SUPPORTED[0] <= numbers < SUPPORTED[1]
    checks = [
        _check(
            "TRL version",
            "ok" if inside else "fail",
            f"{version('trl')}, supported >=1.5,<2",
            "" if inside else "pip install 'trl>=1.5,<2'",
        )
    ]
    from trl import GRPOTrainer

    return checks + [_seam(GRPOTrainer, name, arguments) for name, arguments in TRL_SEAMS.items()]


def _seam(trainer: Any, name: str, arguments: tuple[str, ...]) -> Check:
    fix = "this TRL moved a seam that CreditGRPOTrainer needs: pip install trl==1.16.0"
    method = getattr(trainer, name, None)
    if method is None:
        return _check(f"seam GRPOTrainer.{name}", "fail", "missing", fix)
    found = tuple(inspect.signature(method).parameters)[1 : 1 + len(arguments)]
    if found != arguments:
        return _check(f"seam GRPOTrainer.{name}", "fail", f"arguments {found}, expected {arguments}", fix)
    return _check(f"seam GRPOTrainer.{name}", "ok", "as expected")


def _verl() -> Check:
    try:
        return _check("verl", "ok", version("verl"))
    except PackageNotFoundError:
        return _check("verl", "note", "not installed; only needed for verl on Ray", "")


def _devices() -> Check:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return _check("devices", "ok", f"{torch.cuda.device_count()} GPU: {', '.join(sorted(names))}")
    return _check(
        "devices", "note", f"no GPU; {os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"
    )


def _launcher() -> Check:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return _check(
        "processes",
        "note",
        f"{world} (WORLD_SIZE); `accelerate launch --cpu` starts one whatever it is told, torchrun does not",
    )
