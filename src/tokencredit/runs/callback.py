"""Metrics, evaluations, progress and warnings that a run writes while it trains."""

import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tokencredit.progress import say
from tokencredit.runs import folders, processes
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.runs.stop import Stop

Evaluator = Callable[[Any], dict[str, Any]]
Progress = Callable[[int, str], None]  # steps done, a note

CUT_OFF_WARNING = 0.5  # share of the responses that end at max_completion_length

# What a line of progress shows of a log: label, TRL's key, format.
NOTE = (
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("length", "completions/mean_length", "{:.0f}"),
    ("cut off", "completions/clipped_ratio", "{:.0%}"),
)


class RunCallback(TrainerCallback):
    """Writes metrics.jsonl, reports progress, and stops between two steps when a signal asked for it.

    Args:
      folder: the run's folder.
      config: the run's config. A pipeline that reads only a teacher does not learn from rewards; then equal rewards are
        no fault.
      evaluate: from the model to the numbers of one evaluation; None where there is nothing to evaluate on.
      progress: called with the number of steps done and a note.
      stop: the signals of the command; None where the caller handles them.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        evaluate: Evaluator | None,
        progress: Progress | None,
        *,
        stop: Stop | None = None,
    ) -> None:
        self.folder = folder
        self.every = config.evaluation.every
        self.evaluate = evaluate
        self.progress = progress
        self.stop = stop
        self.parent = multiprocessing.parent_process()  # None but in a worker of `compare`
        self.unsaid = {"cut off"} | ({"no signal"} if config.learns_from_reward else set())
        self.evaluated = ""
        self.unreported = 0  # steps done since the last call of `progress`

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate the model that a run starts from."""
        if state.global_step == 0:
            self._evaluate(model, 0, state)
        elif self.progress is not None:
            self.progress(state.global_step, f"resumed at step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate when it is time, count the step, and stop here when a signal asked for it."""
        if self.parent is not None and not self.parent.is_alive():
            raise SystemExit("the command that started this run is gone")
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._evaluate(model, state.global_step, state)
        self.unreported += 1
        if not control.should_log:  # else the log of this step brings numbers along
            self._report("")
        if self._asked_to_stop(args) and _generation_is_used_up(args, state):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line of metrics, show it, and warn once of what makes training pointless."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in numbers:
            return
        if state.is_world_process_zero:
            folders.append_metrics(self.folder, state.global_step, "train", numbers)
        parts = [f"{label} {form.format(numbers[key])}" for label, key, form in NOTE if key in numbers]
        self._report("  ".join(parts))
        self._warn(numbers, args)

    def _report(self, note: str) -> None:
        if self.progress is not None:
            self.progress(self.unreported, "  ".join(part for part in (note, self.evaluated) if part))
        self.unreported = 0

    def _warn(self, numbers: Mapping[str, float], args: Any) -> None:
        if self.progress is None:
            return
        cut_off = numbers.get("completions/clipped_ratio", 0.0)
        if "cut off" in self.unsaid and cut_off > CUT_OFF_WARNING:
            self.unsaid.discard("cut off")
            say(
                f"warning: {cut_off:.0%} of the responses were cut off at trainer.max_completion_length="
                f"{args.max_completion_length}; what a cut response meant to say is not scored"
            )
        if "no signal" in self.unsaid and numbers.get("frac_reward_zero_std") == 1.0:
            say(
                "warning: in the first batch all responses to a prompt have the same reward "
                f"(mean {numbers.get('reward', 0.0):g}): there is nothing to learn from yet"
            )
        self.unsaid.discard("no signal")

    def _asked_to_stop(self, args: Any) -> bool:
        """Agree with the other processes, which may get the signal a step later."""
        if self.stop is None:
            return False
        asked = self.stop.number is not None
        if processes.size() > 1 and torch.distributed.is_initialized():
            flag = torch.tensor([self.stop.number or 0], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
            self.stop.number = int(flag.item()) or None
        return asked

    def _evaluate(self, model: Any, step: int, state: Any) -> None:
        if self.evaluate is None:
            return
        was_training = model.training
        try:
            metrics = self.evaluate(model)
        finally:
            model.train(was_training)
        numbers = [
            (name, metrics[name]) for name in ("success", "reward") if isinstance(metrics.get(name), int | float)
        ]
        self.evaluated = "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers)
        if state.is_world_process_zero:
            folders.append_metrics(self.folder, step, "eval", metrics)


def _generation_is_used_up(args: Any, state: Any) -> bool:
    """Tell whether the next step samples anew; between two steps of one generation no resumed run is exact."""
    per_generation = max(1, args.steps_per_generation // args.gradient_accumulation_steps) * args.num_iterations
    return bool(state.global_step % per_generation == 0)
