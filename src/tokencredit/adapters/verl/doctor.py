"""What a user's machine has of what the verl adapter relies on; every check names what it found and the fix."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
from typing import Any, Literal

from tokencredit.adapters import versions
from tokencredit.adapters.verl.names import MODES, PREFIX

Check = dict[str, str]
Status = Literal["ok", "fail", "note"]

GROUP = "verl.plugins"
NAMES = tuple(f"{PREFIX}{mode}" for mode in MODES)

# What verl's default trainer needs and `pip install verl` does not bring along.
NEEDED = ("ray", "tensordict", "TransferQueue")

VALUE_HEAD = "AutoModelForCausalLMWithValueHead"

# Module, object, first arguments: what the adapter overrides or calls.
SEAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.__init__", ("self", "config")),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._setup", ("self",)),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", ("self", "batch", "metrics")),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_old_log_prob", ("self", "batch", "metrics")),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_ref_log_prob", ("self", "batch", "metrics")),
    ("verl.trainer.ppo.v1.trainer_base", "register_trainer", ("name",)),
    (
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngineWithLMHead.forward_step",
        ("self", "micro_batch", "loss_function", "forward_only"),
    ),
    ("verl.workers.utils.padding", "response_from_nested", ("tensor", "response_mask")),
    ("verl.utils.tensordict_utils", "get_non_tensor_data", ("data", "key", "default")),
    ("verl.workers.utils.losses", "ppo_loss", ("config", "model_output", "data", "dp_group")),
    ("verl.workers.utils.padding", "no_padding_2_padding", ("tensor", "data")),
    ("verl.workers.engine_workers", "ActorRolloutRefWorker.set_loss_fn", ("self", "loss_fn")),
    ("transfer_queue", "kv_batch_get", ("keys", "partition_id", "select_fields")),
    ("transfer_queue", "kv_batch_put", ("keys", "partition_id", "fields")),
)


def diagnose(ray_worker: bool = True) -> list[Check]:
    """All checks; `ray_worker=False` leaves out the one that starts Ray (some ten seconds)."""
    if not any(True for _ in distributions(name="verl")):
        return [_check("verl", "note", "not installed; only needed for verl on Ray")]
    checks = [_verl_version(), *(_package(name) for name in NEEDED), _entry_point(), _policy()]
    checks.append(_beside_trl())
    if any(check["status"] == "fail" for check in checks):
        return checks  # what follows would only repeat it
    checks += [_driver(), *(_seam(*seam) for seam in SEAMS)]
    return [*checks, _worker()] if ray_worker else checks


def plugin_state() -> str:
    """ "loaded", or why `import verl` did not register the trainers in this process."""
    importlib.import_module("verl")
    adapter = sys.modules.get("tokencredit.adapters.verl.plugin")  # importing it here would hide that verl did not
    if adapter is None:
        return f"verl did not load it: no entry point {GROUP} here, or VERL_USE_EXTERNAL_PLUGINS leaves it out"
    if adapter.FAILURE is not None:
        return f"{type(adapter.FAILURE).__name__}: {adapter.FAILURE}"
    registry = importlib.import_module("verl.trainer.ppo.v1.trainer_base").TRAINER_REGISTRY
    missing = [name for name in NAMES if name not in registry]
    return f"not registered: {', '.join(missing)}" if missing else "loaded"


def _check(name: str, status: Status, found: str, fix: str = "") -> Check:
    return {"name": name, "status": status, "found": found, "fix": fix}


def _verl_version() -> Check:
    installed, supported = version("verl"), versions.supported_range("verl")
    found = f"{installed}, supported {supported}"
    if versions.is_supported("verl", installed):
        return _check("verl version", "ok", found)
    return _check("verl version", "fail", found, f"pip install 'verl{supported}'")


def _package(name: str) -> Check:
    try:
        return _check(name, "ok", version(name))
    except PackageNotFoundError:
        return _check(name, "fail", "not installed; verl's default trainer needs it", f"pip install {name}")


def _entry_point() -> Check:
    ours = [point.value for point in entry_points(group=GROUP) if point.value == "tokencredit.adapters.verl"]
    if ours:
        return _check(f"entry point {GROUP}", "ok", ours[0])
    return _check(f"entry point {GROUP}", "fail", "verl will not find tokencredit", "pip install -e . once more")


def _policy() -> Check:
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip()
    allowed = policy.lower() == "auto" or "tokencredit" in {name.strip() for name in policy.lower().split(",")}
    fix = "" if allowed else "unset VERL_USE_EXTERNAL_PLUGINS, or add tokencredit to it"
    return _check("VERL_USE_EXTERNAL_PLUGINS", "ok" if allowed else "fail", policy, fix)


def _beside_trl() -> Check:
    """verl's workers take this class from any TRL that is installed, and stop where it has none."""
    name = "TRL beside verl"
    if not any(True for _ in distributions(name="trl")):
        return _check(name, "ok", "not installed")
    for module in ("trl.experimental.ppo", "trl"):
        try:
            getattr(importlib.import_module(module), VALUE_HEAD)
            return _check(name, "ok", f"{module} has what verl's workers import")
        except (ImportError, AttributeError):
            continue
    found = f"trl {version('trl')} has no {VALUE_HEAD}, which verl's workers import as they build a model"
    return _check(name, "note", found, "train with verl in an environment without TRL: pip uninstall trl")


def _driver() -> Check:
    return _plugin("plugin in this process", plugin_state)


def _worker() -> Check:
    return _plugin("plugin in a Ray worker", _state_in_worker)


def _plugin(name: str, state: Callable[[], str]) -> Check:
    try:
        found = state()
    except Exception as error:  # a diagnosis reports whatever breaks
        found = f"{type(error).__name__}: {error}"
    fix = "" if found == "loaded" else "mend the error above; `python -c 'import verl'` shows its traceback"
    return _check(name, "ok" if found == "loaded" else "fail", found, fix)


def _state_in_worker() -> str:
    ray = importlib.import_module("ray")
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return str(ray.get(ray.remote(plugin_state).remote(), timeout=120))
    finally:
        if started:
            ray.shutdown()


def _seam(module: str, path: str, arguments: tuple[str, ...]) -> Check:
    name = f"seam {module}.{path}"
    fix = "this verl moved a seam that tokencredit needs: pip install verl==0.9.1"
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # a diagnosis reports whatever breaks
        return _check(name, "fail", f"{type(error).__name__}: {error}", fix)
    given = tuple(inspect.signature(found).parameters)[: len(arguments)]
    if given != arguments:
        return _check(name, "fail", f"arguments {given}, expected {arguments}", fix)
    return _check(name, "ok", "as expected")
