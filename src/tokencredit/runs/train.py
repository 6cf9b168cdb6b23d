"""One run: TRL's trainer with a credit pipeline, evaluation beside it, resumed where it was killed."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tokencredit import files
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.runs import folders, processes
from tokencredit.runs.config.arguments import check_installed, grpo_config, lora_config
from tokencredit.runs.config.load import ignores_reward
from tokencredit.runs.config.plan import Plan, make_plan
from tokencredit.runs.config.types import reward_list
from tokencredit.runs.stop import Stop, Stopped

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")

Progress = Callable[[int, str], None]  # steps done, a note
ShowPlan = Callable[[Plan], None]


def train_run(
    config: Mapping[str, Any],
    folder: Path,
    progress: Progress | None = None,
    *,
    show_plan: ShowPlan | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train as the resolved `config` says, in `folder`; a finished run is returned, a killed one goes on.

    The folder holds config.yaml, run.json, metrics.jsonl, records/ and checkpoints; see docs/report.md. It is locked
    while the run trains. Under a launcher every process calls this function, and the main one writes.

    Args:
      config: what `load_config` returns.
      folder: the folder of the results.
      progress: called with the number of steps done since the last call, and a note.
      show_plan: called once before the first step with what the run is about to do.
      stop: the signals of the command; a signal ends the run after a step, with a checkpoint.

    Returns:
      The contents of run.json.

    Raises:
      TokenCreditError: before anything is written where the config cannot be trained.
      Stopped: `stop` caught a signal; the same call goes on from the checkpoint.
    """
    finished = folders.finished_run(folder, config)
    if finished is not None:
        return finished
    with ExitStack() as held:
        early = (folder / folders.CONFIG).is_file()
        if early and processes.is_main():  # do not load a model only to find that another process trains here
            held.enter_context(files.lock_folder(folder))
        material, arguments = check_run(config, folder)
        peft_config = lora_config(config)
        existed = folder.exists()
        if not early:
            processes.from_main(lambda: held.enter_context(files.lock_folder(folder)))
        finished = processes.from_main(
            lambda: folders.finished_run(folder, config)
        )  # another process may have been first
        if finished is not None:
            return finished
        start = processes.from_main(lambda: folders.prepare(folder, config))
        try:
            trainer = _build_trainer(config, folder, material, arguments, peft_config)
        except TokenCreditError:
            if not existed and processes.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # nothing was trained: leave no folder that looks like a run
            raise
        if show_plan is not None and processes.is_main():
            show_plan(make_plan(config, material, trainer.args, folder, trainer.model, sampler=_sampler_name(trainer)))
        _train(trainer, _callback(config, folder, material, progress, trainer, stop), start, stop)
        trainer.save_model(str(folder / "model"))
        return processes.from_main(lambda: folders.finish(folder, {"steps": trainer.state.global_step}))


def plan_run(config: Mapping[str, Any], folder: Path) -> Plan:
    """Check a run as `train_run` does and say what it would do; nothing is written to the run's folder."""
    folders.finished_run(folder, config)
    material, arguments = check_run(config, folder)
    peft_config = lora_config(config)
    model = material.model
    sampler = "the lab's" if _fast_sampler(config, model, arguments) else "the host's"
    if peft_config is not None:
        from peft import get_peft_model

        try:
            model = get_peft_model(model, peft_config)
        except (ValueError, TypeError) as error:
            raise TokenCreditError(f"peft refuses the lora section: {' '.join(str(error).split())}") from error
    return make_plan(config, material, arguments, folder, model, sampler=sampler)


def _train(trainer: Any, callback: Any, start: Path | None, stop: Stop | None) -> None:
    """Run the host's loop; a signal that `stop` caught ends it after a step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    if stop is not None:
        stop.training = True
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        if stop is not None:
            stop.training = False
    if stop is not None and stop.number is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(stop.number, f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")


def check_run(config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """Load what the run needs and refuse what cannot be trained; nothing is written to the run's folder."""
    from tokencredit.adapters.trl import checks as trl_checks
    from tokencredit.adapters.trl.collectors import built_in
    from tokencredit.collect.table import resolve_options
    from tokencredit.runs.data.material import load_material

    quiet()
    if config["threads"] is not None:
        torch.set_num_threads(int(config["threads"]))  # before a lab model is built: idle threads that spin cost more
    lora_config(config)
    check_installed(grpo_config(config, folder, 1))  # what needs no model is refused before one is loaded
    material = load_material(config)
    arguments = grpo_config(config, folder, material.max_response)
    pipeline = Pipeline.parse(config["credit"])
    adapter = config["lora"] is not None or hasattr(material.model, "peft_config")
    options, own = resolve_options(config["collectors"])
    collected = {*built_in(options, None, adapter=adapter), *own, *material.collectors, *_of_teacher(config["teacher"])}
    trl_checks.check_all(pipeline, config["timing"], collected, arguments)
    _check_whole_groups(pipeline, config["teacher"], arguments)
    return material, arguments


def _of_teacher(teacher: Mapping[str, Any] | None) -> set[str]:
    """The fields that a `teacher:` section fills; a server gives log-probs only for the sampled tokens."""
    if teacher is None:
        return set()
    return {"teacher_logprobs"} if teacher.get("kind") == "server" else {"teacher_logprobs", "teacher_entropies"}


def _check_whole_groups(pipeline: Pipeline, teacher: Mapping[str, Any] | None, arguments: Any) -> None:
    """A teacher that is shown another response to the prompt looks for it among the rows of its own process."""
    if processes.size() == 1 or teacher is None or "teacher_logprobs" not in pipeline.requires:
        return
    from tokencredit.collect.teacher.build import resolve_teacher
    from tokencredit.collect.teacher.prompts import PromptRenderer

    rows = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if PromptRenderer(resolve_teacher(teacher)).needs_attempts and rows % arguments.num_generations:
        raise TokenCreditError(
            f"this teacher shows other responses to a prompt, and {rows} rows a process cut groups of "
            f"{arguments.num_generations} apart",
            hint="make prompts_per_step a multiple of the number of processes",
        )


def _build_trainer(config: Mapping[str, Any], folder: Path, material: Any, arguments: Any, peft_config: Any) -> Any:
    """Build TRL's trainer; what it refuses becomes one line."""
    from tokencredit.adapters.trl.trainer import CreditGRPOTrainer

    weights = [reward.weight for reward in reward_list(config["reward"])]
    if any(weight != 1 for weight in weights):
        arguments.reward_weights = weights
    try:
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
            **({} if peft_config is None else {"peft_config": peft_config}),
        )
    except TokenCreditError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise TokenCreditError(f"TRL cannot start this run: {' '.join(str(error).split())[:500]}") from error


def _sampler_name(trainer: Any) -> str:
    return "the host's" if trainer.rollout_func is None else "the lab's"


def _fast_sampler(config: Mapping[str, Any], model: Any, arguments: Any) -> Any:
    """The lab's sampler where it can replace the host's: a lab model and plain softmax sampling."""
    from tokencredit.lab.rollout import UNUSED, rollout_func
    from tokencredit.lab.sampler import is_lab_model, unsupported

    if config["sampler"] == "host" or (config["sampler"] == "auto" and not is_lab_model(model)):
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


def _callback(
    config: Mapping[str, Any],
    folder: Path,
    material: Any,
    progress: Progress | None,
    trainer: Any,
    stop: Stop | None,
) -> Any:
    from tokencredit.runs.callback import RunCallback
    from tokencredit.runs.evaluation import evaluator

    evaluate = evaluator(config, material, trainer)
    return RunCallback(
        folder,
        config,
        evaluate,
        progress if processes.is_main() else None,
        stop=stop,
        learns_from_reward=not ignores_reward(config["credit"]),
    )


def quiet() -> None:
    """Keep hosts' chatter off the terminal, and their usage reports off the network: progress and results are ours.

    TRL reports each training to the model hub unless HF_HUB_DISABLE_TELEMETRY is set; a value that the user has set
    stays.
    """
    import logging

    from datasets.utils.logging import disable_progress_bar as quiet_datasets
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_datasets()
    quiet_transformers()
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from huggingface_hub import constants

    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported, and have read the environment, before
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
