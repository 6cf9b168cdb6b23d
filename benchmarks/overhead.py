"""What credit costs: step time of TRL's stock GRPO trainer against `CreditGRPOTrainer`, side by side in one run.

    python benchmarks/overhead.py [--rounds 8] [--steps 4] [--json]

The learning rate is 0, so every variant samples and trains on the same rollouts, in every round: the work is the same
but for the credit. Variants take turns, and time is CPU time of one thread. Three columns, from the most to the least
exposed to what else the machine does:

* `median`: the median over all steps of the ratio to the stock trainer's step on the same rollouts; with middle half;
* `quietest`: each step's fastest round, summed, over the same for stock;
* `own code`: the time inside the methods that the credit trainer adds, as a share of the step.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.lab import data
from tokencredit.lab.model import warm_start
from tokencredit.lab.rollout import rollout_func
from tokencredit.progress import track
from tokencredit.runs.train import quiet

VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock again": {},  # how much two equal trainers differ: the noise of this benchmark
    "identity": {"credit": "grpo"},
    "hapo, timing=update": {"credit": "hapo", "timing": "update"},
    "hapo, timing=rollout": {"credit": "hapo", "timing": "rollout"},
}


# What the credit trainer adds to a step.
OWN = ("_row_keys", "_collect", "_measure_old_policy", "_at_update", "_assign")


class StepClock(TrainerCallback):
    """CPU time of each step, generation included, and how much of it went into the methods of `OWN`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.own: list[float] = []
        self.start = self.inside = 0.0
        self.depth = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start, self.inside = time.thread_time(), 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.thread_time() - self.start)
        self.own.append(self.inside)

    def watch(self, trainer: GRPOTrainer) -> None:
        """Count the time inside the outermost call of the trainer's own methods."""
        for name in OWN:
            setattr(trainer, name, self.counted(getattr(trainer, name)))

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, with its time on the clock."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            self.depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.inside += time.thread_time() - begin

        return counted


def build(
    folder: Path, arguments: argparse.Namespace, credit: dict[str, Any], *, beta: float = 0.0, lora: Any = None
) -> tuple[GRPOTrainer, StepClock]:
    """A trainer with a clock: TRL's own without `credit`. One step more than is measured, the first warms up."""
    config = GRPOConfig(
        str(folder),
        max_steps=arguments.steps + 1,
        per_device_train_batch_size=arguments.prompts * 16,
        num_generations=16,
        max_completion_length=20,
        learning_rate=0.0,
        beta=beta,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
    )
    model_folder = warm_start("countdown")
    kind = CreditGRPOTrainer if credit else GRPOTrainer
    trainer = kind(
        model=data.load_model(model_folder),
        processing_class=data.load_tokenizer(model_folder),
        reward_funcs=data.reward_function("countdown"),
        train_dataset=data.prompt_dataset("countdown", "train", 512),
        args=config,
        rollout_func=rollout_func,
        peft_config=lora,
        **credit,
    )
    clock = StepClock()
    if kind is CreditGRPOTrainer:
        clock.watch(trainer)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


Times = dict[str, list[list[float]]]  # by variant: [round][step]; a step is the same rollout batch in every round


def measure(
    variants: Mapping[str, dict[str, Any]],
    arguments: argparse.Namespace,
    *,
    title: str = "rounds",
    during: Callable[[StepClock], AbstractContextManager[Any]] = lambda clock: nullcontext(),
    **settings: Any,
) -> tuple[Times, Times]:
    """Step times, and the time in the trainer's own code; variants take turns, each round `during` its context."""
    times: Times = {name: [] for name in variants}
    own: Times = {name: [] for name in variants}
    names = list(variants)
    with tempfile.TemporaryDirectory() as folder:
        built = {
            name: build(Path(folder) / str(n), arguments, variants[name], **settings) for n, name in enumerate(names)
        }
        for turn in track(range(arguments.rounds), title):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                trainer, clock = built[name]
                clock.times.clear()
                clock.own.clear()
                trainer._step = 0
                trainer._buffered_inputs = None
                with during(clock):
                    trainer.train()
                times[name].append(clock.times[1:])
                own[name].append(clock.own[1:])
    return times, own


def report(times: Times, own: Times) -> list[dict[str, Any]]:
    """The ratios to stock and the share of a variant's own code, one row each."""
    stock = np.array(times["stock"])  # [rounds, steps]
    rows = []
    for name in times:
        mine = np.array(times[name])
        low, middle, high = np.quantile(mine / stock, [0.25, 0.5, 0.75])
        rows.append(
            {
                "variant": name,
                "step_seconds": float(np.median(mine)),
                "median": float(middle),
                "low": float(low),
                "high": float(high),
                "quietest": float(mine.min(0).sum() / stock.min(0).sum()),
                "own_share": float(np.median(np.array(own[name]) / mine)),
                "steps": mine.size,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rows = report(*measure(VARIANTS, arguments))
    if arguments.json:
        print(json.dumps(rows))
        return
    show("variant", rows)
    print(f"{rows[0]['steps']} steps each, {arguments.prompts} prompts x 16, one thread")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows of `report` as a table."""
    print(f"{title:<28} {'step, s':>8} {'median':>8}   {'middle half':<12} {'quietest':>8} {'own code':>9}")
    for row in rows:
        spread = f"{row['low']:.3f}–{row['high']:.3f}"
        print(
            f"{row['variant']:<28} {row['step_seconds']:>8.3f} {row['median']:>8.3f}   {spread:<12} "
            f"{row['quietest']:>8.3f} {row['own_share']:>9.2%}"
        )


if __name__ == "__main__":
    main()
