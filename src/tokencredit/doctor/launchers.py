"""Devices and launchers: what would silently train in one process, or on another device than the user thinks."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from tokencredit.doctor.check import Check, check
from tokencredit.errors import TokenCreditError
from tokencredit.files import read_yaml

TORCHRUN = "tokencredit train CONFIG --launch torchrun --nproc-per-node N"
# Accelerate's name for "one process", and the one that its launcher starts as one.
ALONE = ("NO", "MULTI_CPU")


def diagnose(environment: Mapping[str, str] | None = None, accelerate_config: Path | None = None) -> list[Check]:
    """All checks of this machine, or of another environment and accelerate config."""
    variables = os.environ if environment is None else environment
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        devices(variables, gpus, nvidia=Path("/dev/nvidia0").exists()),
        processes(variables, gpus),
        accelerate(accelerate_config or default_config(variables), gpus),
        threads(variables),
        backends(),
    ]


def devices(environment: Mapping[str, str], gpus: int, *, nvidia: bool) -> Check:
    """GPUs that this process sees, and why it may see fewer than there are."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    listed = [] if visible is None else [item for item in visible.split(",") if item.strip() not in ("", "-1")]
    if gpus and visible is not None and len(listed) > gpus:
        return check(
            "devices",
            "fail",
            f"CUDA_VISIBLE_DEVICES={visible} names {len(listed)} GPUs, torch sees {gpus}",
            "name GPUs that exist (`nvidia-smi -L`), or unset CUDA_VISIBLE_DEVICES",
        )
    if gpus:
        return check("devices", "ok", f"{gpus} GPU" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""))
    if visible is not None and not listed and nvidia:
        found = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: training runs on the CPU"
        return check("devices", "fail", found, "unset CUDA_VISIBLE_DEVICES")
    if nvidia:
        found = f"a GPU is there, but torch {torch.__version__} does not see it: training runs on the CPU"
        return check("devices", "fail", found, "install a CUDA build of torch that fits the driver (`nvidia-smi`)")
    return check("devices", "note", f"no GPU; {os.cpu_count()} processors")


def processes(environment: Mapping[str, str], gpus: int) -> Check:
    """How many processes the variables of a launcher stand for."""
    world, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if not world and not rank:
        more = f", {gpus} GPUs: the others stay idle" if gpus > 1 else ""
        return check("processes", "note", f"one{more}; several: {TORCHRUN}")
    broken = not world.isdigit() or not rank.isdigit() or int(rank) >= int(world)
    if broken:
        found = f"WORLD_SIZE={world or '(unset)'} and RANK={rank or '(unset)'} do not belong together"
        return check("processes", "fail", found, f"unset both, and start with {TORCHRUN}")
    local = environment.get("LOCAL_WORLD_SIZE", world)
    if gpus and local.isdigit() and int(local) > gpus:
        found = f"{local} processes on this machine share {gpus} GPU"
        return check("processes", "fail", found, f"--nproc-per-node {gpus}")
    return check("processes", "ok", f"rank {rank} of {world}")


def default_config(environment: Mapping[str, str]) -> Path:
    """Where `accelerate launch` looks for its config without `--config_file`."""
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(home).expanduser() / "accelerate" / "default_config.yaml"


def accelerate(path: Path, gpus: int) -> Check:
    """Whether `accelerate launch` starts what its config says; on the CPU it starts one process whatever that is."""
    name, torchrun = "accelerate launch", f"start with {TORCHRUN}"
    if not path.is_file():
        return check(name, "note", f"no config at {path}; on the CPU it starts one process whatever it is told")
    try:
        config = read_yaml(path, "config of accelerate")
    except TokenCreditError as error:
        return check(name, "fail", error.message, "run `accelerate config` again")
    if not isinstance(config, Mapping):
        return check(name, "fail", f"{path} holds no mapping", "run `accelerate config` again")
    count, kind = config.get("num_processes", 1), str(config.get("distributed_type", "NO"))
    if isinstance(count, int) and count > 1 and (config.get("use_cpu") or kind in ALONE):
        found = f"{path}: num_processes {count}, but {kind} on {'the CPU' if config.get('use_cpu') else 'one device'}"
        return check(name, "fail", f"{found} starts one process", torchrun)
    if count == 1 and gpus > 1:
        found = f"{path}: num_processes 1, {gpus} GPUs: the others stay idle"
        return check(name, "fail", found, f"set num_processes: {gpus} there, or {torchrun}")
    if not gpus and kind in ("FSDP", "DEEPSPEED"):
        return check(name, "note", f"{path}: {kind}, {count} processes; without a GPU weights are not sharded")
    return check(name, "ok", f"{path}: {count} processes, {kind}")


def threads(environment: Mapping[str, str]) -> Check:
    """Whether processes that share the processors also share out the threads."""
    text = environment.get("LOCAL_WORLD_SIZE", "1")
    here = int(text) if text.isdigit() else 1
    used, processors = torch.get_num_threads(), os.cpu_count() or 1
    found = f"torch uses {used} of {processors} processors in each of {here} processes"
    if here * used > processors and here > 1:
        return check("threads", "fail", found, f"set OMP_NUM_THREADS={max(1, processors // here)}")
    return check("threads", "ok", found)


def backends() -> Check:
    """What processes can talk over."""
    if not torch.distributed.is_available():
        return check("collectives", "fail", "this torch has no torch.distributed", "install another build of torch")
    present = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    names = [name for name, there in present.items() if there]
    if not names:
        return check("collectives", "fail", "neither gloo nor NCCL", "install another build of torch")
    return check("collectives", "ok", ", ".join(names))
