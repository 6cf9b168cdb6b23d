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
from tokencredit.runs import folders, world

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")

Progress = Callable[[int, str], None]  # steps done, a note


def train_run(config: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train as the resolved `config` says, in `folder`; a finished run is returned, a killed one goes on.

    The folder holds config.yaml, run.json, metrics.jsonl, records/ and checkpoints; see docs/report.md. Returns the
    contents of run.json. Raises `TokenCreditError` before anything is written where the config cannot be trained.
    Under a launcher every process calls it, and the main one writes.
    """
    finished = folders.finished_run(folder, config)
    if finished is not None:
        return finished
    material, arguments = check_run(config, folder)
    start = world.from_main(lambda: folders.prepare(folder, config))
    from transformers import PrinterCallback

    trainer = _build_trainer(config, folder, material, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_callback(config, folder, material, progress, trainer))
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.save_model(str(folder / "model"))
    return world.from_main(lambda: _finish(folder, trainer.state.global_step))


def _finish(folder: Path, steps: int) -> dict[str, Any]:
    run = folders.finish(folder, {"steps": steps})
    for checkpoint in folder.glob("checkpoint-*"):  # the model itself is kept in model/
        shutil.rmtree(checkpoint)
    return run


def check_run(config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """Load what the run needs and refuse what cannot be trained; nothing is written to the run's folder."""
    from tokencredit.adapters import trl_checks
    from tokencredit.adapters.collector_options import resolve_options
    from tokencredit.adapters.trl_collectors import built_in
    from tokencredit.runs.data import load_material

    quiet()
    torch.set_num_threads(int(config["threads"]))  # before a lab model is built: idle threads that spin cost more
    material = load_material(config)
    arguments = grpo_config(config, folder, material.max_response)
    arguments.reward_weights = arguments.reward_weights or material.reward_weights
    pipeline = Pipeline.parse(config["credit"])
    adapter = config["lora"] is not None or hasattr(material.model, "peft_config")
    options, own = resolve_options(config["collectors"])
    collected = {*built_in(options, None, adapter=adapter), *own, *material.collectors, *_of_teacher(config["teacher"])}
    trl_checks.check_all(pipeline, config["timing"], collected, arguments)
    _check_whole_groups(pipeline, config["teacher"], arguments)
    return material, arguments


def _of_teacher(teacher: Mapping[str, Any] | None) -> set[str]:
    """The fields that a `teacher:` section fills; a server gives the log-probs of sampled tokens alone."""
    if teacher is None:
        return set()
    return {"teacher_logprobs"} if teacher.get("kind") == "server" else {"teacher_logprobs", "teacher_entropies"}


def grpo_config(config: Mapping[str, Any], folder: Path, max_response: int) -> Any:
    """TRL's own config object; its complaints become one line."""
    from trl import GRPOConfig

    given = dict(config["trainer"])
    generations = int(given["num_generations"])
    if generations < 2:
        raise TokenCreditError(
            f"`trainer.num_generations` must be at least 2, got {generations}", hint="a group needs a baseline"
        )
    given.setdefault("per_device_train_batch_size", _rows_of_a_process(config))
    accumulation = int(given.get("gradient_accumulation_steps", 1))
    rows = int(given["per_device_train_batch_size"])
    if rows * accumulation * world.size() % generations:
        raise TokenCreditError(
            f"{rows} rows × {accumulation} accumulation steps × {world.size()} processes are no whole groups of "
            f"{generations}",
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


def _rows_of_a_process(config: Mapping[str, Any]) -> int:
    """Rows of a micro-batch, so that a step has `prompts_per_step` prompts whatever the number of processes."""
    given = config["trainer"]
    rows = int(config["prompts_per_step"]) * int(given["num_generations"])
    processes, accumulation = world.size(), int(given.get("gradient_accumulation_steps", 1))
    if processes > rows:
        raise TokenCreditError(
            f"{processes} processes for {rows} rows: {config['prompts_per_step']} prompts × {given['num_generations']}",
            hint="start fewer processes, or raise prompts_per_step",
        )
    if rows % (processes * accumulation):
        raise TokenCreditError(
            f"{rows} rows a step cannot be split over {processes} processes × {accumulation} accumulation steps",
            hint="make prompts_per_step × trainer.num_generations a multiple of both",
        )
    return rows // (processes * accumulation)


def _check_whole_groups(pipeline: Pipeline, teacher: Mapping[str, Any] | None, arguments: Any) -> None:
    """A teacher that is shown another response to the prompt looks for it among the rows of its own process."""
    if world.size() == 1 or teacher is None or "teacher_logprobs" not in pipeline.requires:
        return
    from tokencredit.collect.teacher import resolve_teacher
    from tokencredit.collect.teacher_prompts import PromptRenderer

    rows = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if PromptRenderer(resolve_teacher(teacher)).needs_attempts and rows % arguments.num_generations:
        raise TokenCreditError(
            f"this teacher shows other responses to a prompt, and {rows} rows a process cut groups of "
            f"{arguments.num_generations} apart",
            hint="make prompts_per_step a multiple of the number of processes",
        )


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
    if any(os.environ.get(name, "").lower() in ("true", "1") for name in SHARDING):
        reasons.append("the weights are sharded over processes")
    refused = unsupported(model)
    reasons += [refused] if refused else []
    if reasons and config["sampler"] == "fast":
        raise TokenCreditError(f"the fast sampler cannot run this: {reasons[0]}", hint="set `sampler: host`")
    return None if reasons else rollout_func


def _callback(config: Mapping[str, Any], folder: Path, material: Any, progress: Progress | None, trainer: Any) -> Any:
    from tokencredit.runs.callback import RunCallback
    from tokencredit.runs.evaluation import evaluator

    evaluate = evaluator(config, material, trainer)
    return RunCallback(folder, config, evaluate, progress if world.is_main() else None)


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
