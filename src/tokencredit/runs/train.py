"""One run: TRL's trainer with a credit pipeline, evaluation beside it, resumed where it was killed."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tokencredit.credit import Pipeline
from tokencredit.errors import TokenCreditError
from tokencredit.runs import folders

Progress = Callable[[int, str], None]  # steps done, a note


def train_run(config: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train as the resolved `config` says, in `folder`; a finished run is returned, a killed one goes on.

    The folder holds config.yaml, run.json, metrics.jsonl, records/ and checkpoints; see docs/report.md. Returns the
    contents of run.json. Raises `TokenCreditError` before anything is written where the config cannot be trained.
    """
    finished = folders.finished_run(folder, config)
    if finished is not None:
        return finished
    material, arguments = check_run(config, folder)
    start = folders.prepare(folder, config)
    from transformers import PrinterCallback

    trainer = _build_trainer(config, folder, material, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_callback(config, folder, material, progress))
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.save_model(str(folder / "model"))
    run = folders.finish(folder, {"steps": trainer.state.global_step})
    for checkpoint in folder.glob("checkpoint-*"):  # the model itself is kept in model/
        shutil.rmtree(checkpoint)
    return run


def check_run(config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """Load what the run needs and refuse what cannot be trained; nothing is written to the run's folder."""
    from tokencredit.adapters import trl_checks
    from tokencredit.adapters.trl_collectors import built_in
    from tokencredit.adapters.trl_options import resolve_options
    from tokencredit.runs.data import load_material

    quiet()
    torch.set_num_threads(
        int(config["threads"])
    )  # before a lab model is built: idle threads that spin are worse than none
    material = load_material(config)
    arguments = grpo_config(config, folder, material.max_response)
    pipeline = Pipeline.parse(config["credit"])
    adapter = config["lora"] is not None or hasattr(material.model, "peft_config")
    options, own = resolve_options(config["collectors"])
    collected = {*built_in(options, None, adapter=adapter), *own, *material.collectors}
    if config["teacher"] is not None:
        collected.add("teacher_logprobs")
    trl_checks.check_all(pipeline, config["timing"], collected, arguments)
    return material, arguments


def grpo_config(config: Mapping[str, Any], folder: Path, max_response: int) -> Any:
    """TRL's own config object; its complaints become one line."""
    from trl import GRPOConfig

    given = dict(config["trainer"])
    generations = int(given["num_generations"])
    if generations < 2:
        raise TokenCreditError(
            f"`trainer.num_generations` must be at least 2, got {generations}", hint="a group needs a baseline"
        )
    rows = int(given.setdefault("per_device_train_batch_size", config["prompts_per_step"] * generations))
    accumulation = int(given.get("gradient_accumulation_steps", 1))
    if rows * accumulation * int(os.environ.get("WORLD_SIZE", "1")) % generations:
        raise TokenCreditError(
            f"{rows} rows × {accumulation} accumulation steps are no whole groups of {generations}",
            hint="make trainer.per_device_train_batch_size a multiple of trainer.num_generations",
        )
    given.setdefault("max_completion_length", max_response)
    given.setdefault("max_steps", config["steps"])
    if not torch.cuda.is_available():
        given |= {"use_cpu": True, "bf16": given.get("bf16", False), "dataloader_pin_memory": False}
    given |= {"output_dir": str(folder), "seed": config["seed"]}
    try:
        return GRPOConfig(**given)
    except (ValueError, TypeError) as error:
        raise TokenCreditError(f"TRL refuses the trainer section: {' '.join(str(error).split())}") from error


def _build_trainer(config: Mapping[str, Any], folder: Path, material: Any, arguments: Any) -> Any:
    from tokencredit.adapters.trl import CreditGRPOTrainer

    extra: dict[str, Any] = {}
    if config["lora"] is not None:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(**config["lora"])
    return CreditGRPOTrainer(
        model=material.model,
        reward_funcs=material.reward,
        args=arguments,
        train_dataset=material.dataset,
        processing_class=material.tokenizer,
        credit=Pipeline.parse(config["credit"]),
        timing=config["timing"],
        records=folder / "records" if config["records"]["every"] else None,
        record_every=config["records"]["every"] or 1,
        teacher=material.teacher,
        collectors=dict(material.collectors) | config["collectors"],
        rollout_func=_fast_sampler(config, material.model, arguments),
        **extra,
    )


def _fast_sampler(config: Mapping[str, Any], model: Any, arguments: Any) -> Any:
    """The lab's sampler where it can replace the host's: a small model and plain softmax sampling."""
    from tokencredit.lab.rollout import UNUSED, rollout_func
    from tokencredit.lab.sampler import unsupported

    if config["sampler"] == "host":
        return None
    reasons = [
        f"{name}={getattr(arguments, name)!r}"
        for name, off in UNUSED.items()
        if getattr(arguments, name, off[0]) not in off
    ]
    if (config["lora"] or {}).get("use_dora"):
        reasons.append("lora.use_dora")
    refused = unsupported(model)
    reasons += [refused] if refused else []
    if reasons and config["sampler"] == "fast":
        raise TokenCreditError(f"the fast sampler cannot run this: {reasons[0]}", hint="set `sampler: host`")
    return None if reasons else rollout_func


def _callback(config: Mapping[str, Any], folder: Path, material: Any, progress: Progress | None) -> Any:
    from tokencredit.runs.callback import RunCallback
    from tokencredit.runs.evaluation import evaluator

    return RunCallback(folder, config, evaluator(config, material), progress)


def quiet() -> None:
    """Keep hosts' chatter off the terminal: progress and results are ours to show."""
    import logging

    from datasets.utils.logging import disable_progress_bar as quiet_datasets
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_datasets()
    quiet_transformers()
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
