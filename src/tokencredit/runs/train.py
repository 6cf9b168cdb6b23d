"""Train one run: TRL's trainer with a credit pipeline, evaluation beside it, resumed where it was killed."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokencredit import files
from tokencredit.adapters.trl.card import save_card
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.errors import TokenCreditError
from tokencredit.runs import folders, processes
from tokencredit.runs.callback import RunCallback
from tokencredit.runs.checks import Ready, check_run, choose_sampler
from tokencredit.runs.config.load import Source, load_config
from tokencredit.runs.evaluation import evaluator
from tokencredit.runs.plan import Plan, make_plan
from tokencredit.runs.quiet import quiet
from tokencredit.runs.stop import Stop, Stopped

__all__ = ["plan_run", "quiet", "train_run"]

Progress = Callable[[int, str], None]  # steps done, a note
ShowPlan = Callable[[Plan], None]


def train_run(
    config: Source,
    folder: Path,
    progress: Progress | None = None,
    *,
    show_plan: ShowPlan | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train a run in `folder`; a finished run is returned, a killed one goes on.

    The folder holds config.yaml, run.json, metrics.jsonl, records/ and checkpoints; see docs/report.md. It is locked
    while the run trains. Under a launcher every process calls this function, and the main one writes.

    Args:
      config: what `load_config` returns, or what it takes.
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
    config = load_config(config)
    finished = folders.finished_run(folder, config)
    if finished is not None:
        return finished
    with ExitStack() as held:
        early = (folder / folders.CONFIG).is_file()
        if early and processes.is_main():  # do not load a model only to find that another process trains here
            held.enter_context(files.lock_folder(folder))
        ready = check_run(config, folder)
        existed = folder.exists()
        if not early:
            processes.from_main(lambda: held.enter_context(files.lock_folder(folder)))
        # Another process may have been first.
        finished = processes.from_main(lambda: folders.finished_run(folder, config))
        if finished is not None:
            return finished
        checkpoint = processes.from_main(lambda: folders.prepare(folder, config))
        try:
            trainer = _build_trainer(ready)
        except TokenCreditError:
            if not existed and processes.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # nothing was trained: leave no folder that looks like a run
            raise
        if show_plan is not None and processes.is_main():
            show_plan(make_plan(ready._replace(arguments=trainer.args), trainer.model, trainer.rollout_func))
        evaluate = evaluator(config.evaluation, ready.material, trainer)
        told = progress if processes.is_main() else None
        trainer.add_callback(RunCallback(folder, config, evaluate, told, stop=stop))
        _train(trainer, checkpoint, stop)
        trainer.save_model(str(folder / "model"))
        # In place of peft's empty card: what is copied elsewhere is the model's folder.
        processes.from_main(lambda: save_card(trainer, config.pipeline, folder.name, folder / "model"))
        return processes.from_main(lambda: folders.finish(folder, {"steps": trainer.state.global_step}))


def plan_run(config: Source, folder: Path) -> Plan:
    """Check a run as `train_run` does and say what it would do; nothing is written to the run's folder."""
    config = load_config(config)
    folders.finished_run(folder, config)
    ready = check_run(config, folder)
    model, sampler = ready.material.model, choose_sampler(ready)
    if ready.lora is not None:
        from peft import get_peft_model

        try:
            model = get_peft_model(model, ready.lora)
        except (ValueError, TypeError) as error:
            raise TokenCreditError(f"peft refuses the lora section: {' '.join(str(error).split())}") from error
    return make_plan(ready, model, sampler)


def _build_trainer(ready: Ready) -> CreditGRPOTrainer:
    """Build TRL's trainer; what it refuses becomes one line."""
    config, material = ready.config, ready.material
    _, functions = config.collector_functions
    collectors: Mapping[str, Any] = {**material.collectors, **config.collectors, **functions}
    adapter = {} if ready.lora is None else {"peft_config": ready.lora}
    try:
        return CreditGRPOTrainer(
            model=material.model,
            reward_funcs=material.rewards,
            args=ready.arguments,
            train_dataset=material.dataset,
            processing_class=material.tokenizer,
            credit=config.pipeline,
            timing=config.timing,
            records=ready.folder / folders.RECORDS if config.records.every else None,
            record_every=config.records.every or 1,
            teacher=material.teacher,
            collectors=collectors,
            rollout_func=choose_sampler(ready),
            **adapter,
        )
    except TokenCreditError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise TokenCreditError(f"TRL cannot start this run: {' '.join(str(error).split())[:500]}") from error


def _train(trainer: CreditGRPOTrainer, checkpoint: Path | None, stop: Stop | None) -> None:
    """Run the host's loop; a signal that `stop` caught ends it after a step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if stop is not None:
        stop.training = True
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if stop is not None:
            stop.training = False
    if stop is not None and stop.number is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(stop.number, f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
