"""From a config to TRL's GRPOConfig: the split of a step into micro-batches, and checks of what is installed."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.runs import processes
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.settings import is_whole

ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


class Split(NamedTuple):
    """The rows of one optimizer step: micro-batch × accumulation × processes = prompts × generations."""

    micro_batch: int
    accumulation: int
    processes: int


def grpo_config(config: RunConfig, folder: Path, max_response: int) -> Any:
    """Build TRL's own config object; its complaints become one line."""
    from trl import GRPOConfig

    split = split_step(config)
    fields = {"max_completion_length": max_response, **config.trainer}
    fields |= {ROWS: split.micro_batch, ACCUMULATION: split.accumulation}
    fields |= {"output_dir": str(folder), "seed": config.seed, "max_steps": config.steps}
    if not torch.cuda.is_available():
        fields |= {"use_cpu": True, "bf16": fields.get("bf16", False), "dataloader_pin_memory": False}
    weights = [reward.weight for reward in config.rewards]
    if any(weight != 1 for weight in weights):
        fields["reward_weights"] = weights
    try:
        return GRPOConfig(**fields)
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, AttributeError) as error:
        raise TokenCreditError(f"TRL refuses the trainer section: {' '.join(str(error).split())}") from error


def split_step(config: RunConfig) -> Split:
    """Split the rows of a step, so that it has `prompts_per_step` prompts whatever fits into memory.

    `trainer.per_device_train_batch_size` sets the micro-batch, and accumulation follows from it; or the other way round
    with `trainer.gradient_accumulation_steps`. With neither, a lab model takes a step in one micro-batch, any other
    model in micro-batches of at most TRL's default of 8 rows.

    Raises:
      TokenCreditError: the rows cannot be split that way, or the two fields contradict `prompts_per_step`.
    """
    process_count = processes.size()
    prompts, generations = int(config.prompts_per_step or 1), int(config.trainer["num_generations"])
    if generations < 2:
        raise TokenCreditError(
            f"`trainer.num_generations` must be at least 2, got {generations}", hint="a group needs a baseline"
        )
    rows = prompts * generations
    step = f"{rows} rows of a step ({prompts} prompts × {generations} generations)"
    if process_count > rows:
        raise TokenCreditError(
            f"{process_count} processes for {rows} rows: {prompts} prompts × {generations}",
            hint="start fewer processes, or raise prompts_per_step",
        )
    if rows % process_count:
        raise TokenCreditError(
            f"{step} cannot be split over {process_count} processes",
            hint="make prompts_per_step × trainer.num_generations a multiple of the processes",
        )
    return _split_process(config, rows // process_count, process_count, step)


def _split_process(config: RunConfig, rows: int, process_count: int, step: str) -> Split:
    """Split the rows of one process into micro-batches."""
    size, steps = config.trainer.get(ROWS), config.trainer.get(ACCUMULATION)
    if size is None and steps is None:
        largest = rows if config.is_lab else min(8, rows)
        size = max(divisor for divisor in range(1, largest + 1) if rows % divisor == 0)
    if size is None:
        accumulation = int(steps or 1)
        micro_batch = rows // accumulation
    else:
        micro_batch = int(size)
        accumulation = int(steps or rows // micro_batch)
    if micro_batch * accumulation != rows:
        into = [] if steps is None else [f"{steps} accumulation steps"]
        into += [] if size is None else [f"micro-batches of {size} rows"]
        raise TokenCreditError(
            f"the {step} cannot be split into {' of '.join(into)} × {process_count} "
            f"process{'es' * (process_count > 1)}",
            hint=f"choose a divisor of {rows} for trainer.{ROWS} and leave out trainer.{ACCUMULATION}, or change "
            "prompts_per_step",
        )
    return Split(micro_batch, accumulation, process_count)


def lora_config(config: RunConfig) -> Any:
    """Build peft's LoraConfig from the `lora:` section; None without one."""
    if config.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise TokenCreditError("`lora` needs peft, which is not installed", hint="pip install peft") from error
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for name in config.lora:
        if name not in fields:
            raise unknown("field of `lora` (peft's LoraConfig)", name, fields)
    rank = config.lora.get("r", 8)
    if not is_whole(rank, 1):
        raise TokenCreditError(f"`lora.r` must be a whole number of at least 1, got {rank!r}")
    try:
        return LoraConfig(**config.lora)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise TokenCreditError(f"peft refuses the lora section: {' '.join(str(error).split())}") from error


def check_installed(arguments: Any) -> None:
    """Refuse trackers, vLLM and uploads that this machine cannot serve, before anything is written."""
    from transformers.integrations import integration_utils as integrations

    available = integrations.get_available_reporting_integrations()
    for tracker in arguments.report_to:
        if tracker not in integrations.INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in `trainer.report_to`", tracker, integrations.INTEGRATION_TO_CALLBACK)
        if tracker not in available:
            raise TokenCreditError(
                f"`trainer.report_to` names {tracker}, which is not installed", hint=f"pip install {tracker}"
            )
    if arguments.use_vllm and importlib.util.find_spec("vllm") is None:
        raise TokenCreditError("`trainer.use_vllm` needs vLLM, which is not installed", hint="pip install vllm")
    if arguments.push_to_hub and processes.is_main():
        _check_hub(arguments)


def _check_hub(arguments: Any) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=arguments.hub_token)
    except Exception as error:  # offline, no token, a refused token: each library raises its own kinds
        raise TokenCreditError(
            f"`trainer.push_to_hub` cannot log in to the hub: {' '.join(str(error).split())[:300]}",
            hint="run `hf auth login`, or leave out trainer.push_to_hub",
        ) from error
