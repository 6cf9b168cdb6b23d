"""A platform of verl's for machines without an accelerator.

verl's workers load it by `VERL_USE_EXTERNAL_MODULES=verl_cpu`. verl names its engines for CUDA and NPU only; what they
call is torch, and torch shards on the CPU too, over gloo.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.utils import import_utils

CPU = torch.device("cpu")


def nothing(*args: Any, **kwargs: Any) -> int:
    return 0


class PlatformCPU(PlatformCUDA):
    """What verl asks of a device."""

    device_name = "cpu"
    device_module = SimpleNamespace(
        max_memory_allocated=nothing,
        max_memory_reserved=nothing,
        memory_allocated=nothing,
        memory_reserved=nothing,
        mem_get_info=lambda *_: (0, 0),
        empty_cache=nothing,
        synchronize=nothing,
        set_device=nothing,
        current_device=lambda: CPU,
        device_count=lambda: 1,
        get_device_name=lambda *_: "CPU",
        is_available=lambda: True,
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return CPU

    def set_device(self, device_index: int) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"


def on_the_cpu(original: Any) -> Any:
    """FSDP1 takes an index for a GPU's, and broadcasts weights from GPUs only: here every rank loads them."""

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"device_id": CPU, "sync_module_states": False})

    return made


def over_gloo(original: Any) -> Any:
    """verl names a backend for the CPU and one for the device; here they are one."""

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs | {"backend": "gloo"})

    return init


platform_manager.set_platform(PlatformCPU())
FullyShardedDataParallel.__init__ = on_the_cpu(FullyShardedDataParallel.__init__)
torch.distributed.init_process_group = over_gloo(torch.distributed.init_process_group)
import_utils.is_trl_available = lambda: False  # verl imports a class from TRL that recent ones no longer have
