"""`tokencredit doctor`: versions, what TRL and verl offer, devices, disk; for each problem the fix."""

import argparse
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokencredit.progress import printable

# Packages that a config can ask for and that the installation does not bring along: name, and what needs it.
OPTIONAL = {
    "vllm": "`trainer.use_vllm: true`, fast generation",
    "flash-attn": "flash attention, for long contexts",
    "bitsandbytes": "8-bit optimizers and models",
    "deepspeed": "ZeRO through accelerate",
    "wandb": "`trainer.report_to: wandb`",
    "tensorboard": "`trainer.report_to: tensorboard`",
    "trackio": "`trainer.report_to: trackio`",
    "mlflow": "`trainer.report_to: mlflow`",
}
LITTLE = 5 * 2**30  # free bytes below which a checkpoint of a model with a billion parameters does not fit


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "doctor", help="check the installation: versions, TRL and verl, devices, disk, what to fix"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--no-ray", action="store_true", help="do not start Ray to look into one of its workers")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb; 1 when something must be fixed."""
    from tokencredit.doctor.hosts import diagnose, has_verl

    ray_worker = has_verl() and not arguments.no_ray
    if ray_worker:
        print("starting Ray to look into one of its workers …", file=sys.stderr, flush=True)
    checks = [*_ours(), *diagnose(ray_worker), *_cuda(), *_optional(), *_disk()]
    broken = [check for check in checks if check["status"] == "fail"]
    if arguments.json:
        print(json.dumps({"checks": checks, "ok": not broken}))
        return 1 if broken else 0
    mark = {"ok": "ok  ", "fail": "FAIL", "note": "note"}
    for check in checks:
        print(f"{mark[check['status']]}  {printable(check['name'])}: {printable(check['found'])}")
        if check["fix"]:
            print(f"      fix: {printable(check['fix'])}")
    print(f"{len(broken)} to fix" if broken else "nothing to fix", file=sys.stderr)
    return 1 if broken else 0


def _check(name: str, status: str, found: str, fix: str = "") -> dict[str, str]:
    return {"name": name, "status": status, "found": found, "fix": fix}


def _ours() -> list[dict[str, str]]:
    where = Path(__file__).parent.parent
    return [
        _check("tokencredit", "ok", f"{version('tokencredit')}, in {where}"),
        _check("Python", "ok", f"{platform.python_version()} ({sys.executable})"),
    ]


def _cuda() -> list[dict[str, str]]:
    """The build of torch, and each device with its memory."""
    import torch

    if not torch.cuda.is_available():
        build = "for the CPU only" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, no device usable"
        return [_check("CUDA", "note", f"torch {torch.__version__} is built {build}")]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        numbers = f"{device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        found.append(_check(f"cuda:{index}", "ok", f"{device.name}, {numbers}, CUDA {torch.version.cuda}"))
    return found


def _optional() -> list[dict[str, str]]:
    """Packages that are not needed until a config asks for them."""
    found = []
    for name, purpose in OPTIONAL.items():
        try:
            found.append(_check(name, "ok", version(name)))
        except PackageNotFoundError:
            found.append(_check(name, "note", f"not installed; only needed for {purpose}"))
    return found


def _disk() -> list[dict[str, str]]:
    """Where models and results go, and the room that is left there."""
    from tokencredit.lab.cache import cache_root

    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = {"lab's models": cache_root(), "models of the hub": hub, "this folder": Path.cwd()}
    return [_space(name, path) for name, path in places.items()]


def _space(name: str, path: Path) -> dict[str, str]:
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return _check(name, "fail", f"{path}: {error.strerror or error}", "choose another folder")
    text = f"{path}, {free / 2**30:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return _check(name, "note", f"{text}, not writable")
    return _check(name, "note" if free < LITTLE else "ok", text)
