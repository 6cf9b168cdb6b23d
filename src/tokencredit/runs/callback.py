"""What a run writes while it trains: a line of metrics a step, an evaluation every so often, progress."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tokencredit.runs import folders

Evaluator = Callable[[Any], dict[str, Any]]


class RunCallback(TrainerCallback):
    """Writes metrics.jsonl and reports progress; ends the process when the command that started it is gone."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        evaluate: Evaluator | None,
        progress: Callable[[int, str], None] | None,
    ) -> None:
        self.folder = folder
        self.every = int(config["evaluation"]["every"])
        self.evaluate = evaluate
        self.progress = progress
        self.parent = os.getppid()
        self.success: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate(model, 0, state)
        elif self.progress is not None:
            self.progress(state.global_step, "resumed")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if os.getppid() != self.parent:
            raise SystemExit("the command that started this run is gone")
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._evaluate(model, state.global_step, state)
        if self.progress is not None:
            self.progress(1, "" if self.success is None else f"success {self.success:.3f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if state.is_world_process_zero and "loss" in numbers:
            folders.append_metrics(self.folder, state.global_step, "train", numbers)

    def _evaluate(self, model: Any, step: int, state: Any) -> None:
        if self.evaluate is None:
            return
        was_training = model.training
        try:
            found = self.evaluate(model)
        finally:
            model.train(was_training)
        self.success = found["success"]
        if state.is_world_process_zero:
            folders.append_metrics(self.folder, step, "eval", found)
