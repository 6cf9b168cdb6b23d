"""Packages, Python, CUDA and disk: what is installed, what a config may ask for besides, and the room that is left."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import tokencredit
from tokencredit.doctor.check import Check, check

# What training with TRL needs, and what the lab and the reports need besides.
TRAINING = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
REPORTS = ("reasoning-gym", "matplotlib", "jinja2", "rich")
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


def check_python() -> list[Check]:
    """The version of the package and of Python, and where they are."""
    return [
        check("tokencredit", "ok", f"{version('tokencredit')}, in {Path(tokencredit.__file__).parent}"),
        check("Python", "ok", f"{platform.python_version()} ({sys.executable})"),
    ]


def check_required() -> list[Check]:
    """The packages that training and reports need."""
    return [*(_required(name) for name in TRAINING), *(_required(name, lab=True) for name in REPORTS)]


def has_verl() -> bool:
    """Whether verl is installed, so that its checks have something to check."""
    return any(True for _ in distributions(name="verl"))


def _required(name: str, *, lab: bool = False) -> Check:
    try:
        return check(name, "ok", version(name))
    except PackageNotFoundError:
        fix = "pip install 'tokencredit[trl]'"
        if lab and has_verl():  # an environment for a cluster
            return check(name, "note", "not installed; only needed for the lab and for reports", fix)
        return check(name, "fail", "not installed", fix)


def check_optional() -> list[Check]:
    """Packages that are not needed until a config asks for them."""
    return [_optional(name, purpose) for name, purpose in OPTIONAL.items()]


def _optional(name: str, purpose: str) -> Check:
    try:
        return check(name, "ok", version(name))
    except PackageNotFoundError:
        return check(name, "note", f"not installed; only needed for {purpose}")


def check_cuda() -> list[Check]:
    """The build of torch, and each device with its memory."""
    import torch

    if not torch.cuda.is_available():
        build = "for the CPU only" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, no device usable"
        return [check("CUDA", "note", f"torch {torch.__version__} is built {build}")]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        check(
            f"cuda:{index}",
            "ok",
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}, "
            f"CUDA {torch.version.cuda}",
        )
        for index, device in enumerate(devices)
    ]


def check_disk() -> list[Check]:
    """Where models and results go, and the room that is left there."""
    from tokencredit.lab.cache import cache_root

    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = {"lab's models": cache_root(), "models of the hub": hub, "this folder": Path.cwd()}
    return [_check_space(name, path) for name, path in places.items()]


def _check_space(name: str, path: Path) -> Check:
    existing = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return check(name, "fail", f"{path}: {error.strerror or error}", "choose another folder")
    text = f"{path}, {free / 2**30:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        return check(name, "note", f"{text}, not writable")
    return check(name, "note" if free < LITTLE else "ok", text)
