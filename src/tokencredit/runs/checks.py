"""What must hold before a run starts: everything is loaded and checked here, and nothing is written."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.collectors import built_in
from tokencredit.collect.models import is_peft_model
from tokencredit.errors import TokenCreditError
from tokencredit.lab.rollout import rollout_func, unsupported_options
from tokencredit.lab.sampler import is_lab_model, unsupported
from tokencredit.runs import processes
from tokencredit.runs.config.arguments import check_installed, grpo_config, lora_config
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.runs.data.material import Material, check_teacher_columns, load_material, load_teacher
from tokencredit.runs.quiet import quiet

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class Ready(NamedTuple):
    """A run that can be trained: its config and folder, and what was loaded for it."""

    config: RunConfig
    folder: Path
    material: Material
    arguments: Any
    """TRL's GRPOConfig."""
    lora: Any
    """Peft's LoraConfig; None for full fine-tuning."""


def check_run(config: RunConfig, folder: Path) -> Ready:
    """Load what a run needs and refuse what cannot be trained, the cheap checks first."""
    quiet()
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # before a lab model is built: idle threads that spin cost more
    lora = lora_config(config)
    check_installed(grpo_config(config, folder, 1))
    material = load_material(config)
    arguments = grpo_config(config, folder, material.max_response)
    return check_method(Ready(config, folder, material, arguments, lora))


def check_method(ready: Ready) -> Ready:
    """Refuse a credit or a teacher that cannot work with what is loaded; returns the run with its teacher."""
    config, material = ready.config, ready.material
    check_teacher_columns(config, material.dataset, material.tokenizer)
    material = material._replace(teacher=load_teacher(config))
    options, functions = config.collector_functions
    adapter = ready.lora is not None or is_peft_model(material.model)
    collected = {*built_in(options, None, adapter=adapter), *functions, *material.collectors}
    collected |= _fields_of_teacher(config)
    trl_checks.check_all(config.pipeline, config.timing, collected, ready.arguments)
    _check_whole_groups(ready)
    return ready._replace(material=material)


def _fields_of_teacher(config: RunConfig) -> set[str]:
    """The fields that the teacher fills; a server gives log-probs only for the sampled tokens."""
    if config.teacher is None:
        return set()
    return {"teacher_logprobs"} | (set() if config.teacher["kind"] == "server" else {"teacher_entropies"})


def _check_whole_groups(ready: Ready) -> None:
    """A teacher that is shown another response to the prompt looks for it among the rows of its own process."""
    prompts, arguments = ready.config.teacher_prompts, ready.arguments
    if processes.size() == 1 or prompts is None or "teacher_logprobs" not in ready.config.pipeline.requires:
        return
    rows = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if prompts.needs_attempts and rows % arguments.num_generations:
        raise TokenCreditError(
            f"this teacher shows other responses to a prompt, and {rows} rows a process cut groups of "
            f"{arguments.num_generations} apart",
            hint="make prompts_per_step a multiple of the number of processes",
        )


def choose_sampler(ready: Ready) -> Any:
    """The lab's sampler where it can replace the host's, a lab model and plain softmax sampling; else None."""
    config, model = ready.config, ready.material.model
    if config.sampler == "host" or (config.sampler == "auto" and not is_lab_model(model)):
        return None
    reasons = unsupported_options(ready.arguments)
    if (config.lora or {}).get("use_dora"):
        reasons.append("lora.use_dora")
    if any(os.environ.get(name, "").lower() in ("true", "1") for name in SHARDING):
        reasons.append("the weights are sharded over processes")
    reasons += filter(None, [unsupported(model)])
    if reasons and config.sampler == "fast":
        raise TokenCreditError(f"the fast sampler cannot run this: {reasons[0]}", hint="set `sampler: host`")
    return None if reasons else rollout_func
