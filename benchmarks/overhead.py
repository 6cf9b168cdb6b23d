"""What credit costs: step time of TRL's stock GRPO trainer against `CreditGRPOTrainer`, side by side in one run.

    python benchmarks/overhead.py [--rounds 8] [--steps 4] [--json]

The learning rate is 0, so every variant samples and trains on the same rollouts: the work is the same but for the
credit. Variants take turns; a step is compared with the stock trainer's step on the same rollouts. Time is CPU time of
one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tokencredit.adapters.trl import CreditGRPOTrainer
from tokencredit.lab import data
from tokencredit.lab.model import warm_start
from tokencredit.lab.rollout import rollout_func
from tokencredit.runs.train import quiet

VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock again": {},  # how much two equal trainers differ: the noise of this benchmark
    "identity": {"credit": "grpo"},
    "hapo, timing=update": {"credit": "hapo", "timing": "update"},
    "hapo, timing=rollout": {"credit": "hapo", "timing": "rollout"},
}


class StepClock(TrainerCallback):
    """CPU time of each step, generation included."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.thread_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.thread_time() - self.start)


def build(name: str, folder: Path, model_folder: Path, steps: int, prompts: int) -> tuple[GRPOTrainer, StepClock]:
    """A trainer of one variant with a clock; `steps` is one more than what is measured, the first step warms up."""
    config = GRPOConfig(
        str(folder / name.replace(" ", "-")),
        max_steps=steps + 1,
        per_device_train_batch_size=prompts * 16,
        num_generations=16,
        max_completion_length=20,
        learning_rate=0.0,
        beta=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
    )
    kind = CreditGRPOTrainer if VARIANTS[name] else GRPOTrainer
    trainer = kind(
        model=data.load_model(model_folder),
        processing_class=data.load_tokenizer(model_folder),
        reward_funcs=data.reward_function("countdown"),
        train_dataset=data.prompt_dataset("countdown", "train", 512),
        args=config,
        rollout_func=rollout_func,
        **VARIANTS[name],
    )
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def measure(rounds: int, steps: int, prompts: int) -> dict[str, list[float]]:
    """Step times by variant; position i of each list is the same rollout batch."""
    model_folder = warm_start("countdown")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        built = {name: build(name, Path(folder), model_folder, steps, prompts) for name in VARIANTS}
        names = list(VARIANTS)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                trainer, clock = built[name]
                clock.times.clear()
                trainer._step = 0
                trainer._buffered_inputs = None
                trainer.train()
                times[name] += clock.times[1:]
    return times


def report(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median ratio to the stock step on the same rollouts, and the middle half of the ratios."""
    rows = []
    for name, own in times.items():
        ratios = [mine / stock for mine, stock in zip(own, times["stock"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
        step = statistics.median(own)
        rows.append(
            {"variant": name, "step_seconds": step, "ratio": middle, "low": low, "high": high, "steps": len(own)}
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
    rows = report(measure(arguments.rounds, arguments.steps, arguments.prompts))
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'variant':<24} {'step, s':>8} {'ratio to stock':>15}   middle half    ({rows[0]['steps']} steps each)")
    for row in rows:
        spread = f"{row['low']:.3f}–{row['high']:.3f}"
        print(f"{row['variant']:<24} {row['step_seconds']:>8.3f} {row['ratio']:>15.3f}   {spread}")


if __name__ == "__main__":
    main()
