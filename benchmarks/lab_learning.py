"""How fast plain GRPO learns each lab task from its warm start.

    python benchmarks/lab_learning.py [--tasks countdown carry chain] [--seeds 3] [--steps 100]

Trains the cached warm start with the stock `trl.GRPOTrainer` and measures success on held-out problems before and
after: the exact probability that a sample at temperature 1 is accepted. A finished run is kept under the cache folder
and is not repeated. Prints one row per task; exits with status 1 unless the interval of every gain lies above the bar.
"""

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from tokencredit.lab.cache import cache_root, fingerprint
from tokencredit.lab.data import load_model, load_tokenizer, prompt_dataset, reward_function
from tokencredit.lab.model import warm_start
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import TASKS, get_task
from tokencredit.progress import track
from tokencredit.seeds import derive

BAR = 0.25  # gain in success, as a share
HELD_OUT = 200  # problems
RESAMPLES = 10_000


def train(task_name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: success per held-out problem before and after, and the seconds that training took."""
    task = get_task(task_name)
    folder = warm_start(task_name)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    held_out = task.problems("test", HELD_OUT)
    before = success_probability(model, tokenizer, task, held_out)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=options.steps,
            num_generations=options.group,
            per_device_train_batch_size=options.prompts * options.group,
            max_completion_length=task.max_response,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            temperature=1.0,
            beta=0.0,
            loss_type=options.loss,
            gradient_checkpointing=False,
            seed=derive("lab learning", task_name, seed) % 2**31,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward_function(task),
            args=arguments,
            train_dataset=prompt_dataset(task, "train", 2000, seed),
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where the table goes
        start = time.monotonic()
        trainer.train()
    after = success_probability(model, tokenizer, task, held_out)
    return {"before": before.tolist(), "after": after.tolist(), "seconds": time.monotonic() - start}


def finished(task_name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a run, from disk if it was run before with the same warm start and options."""
    settings = {"warm_start": warm_start(task_name).name, "seed": seed, "held_out": HELD_OUT, **vars(options)}
    del settings["tasks"], settings["seeds"]
    path = cache_root() / "lab-learning" / f"{task_name}-{seed}-{fingerprint(settings)}.json"
    if not path.exists():
        result = train(task_name, seed, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(path)
    return json.loads(path.read_text())


def interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean of `values` [seeds, problems], over both axes."""
    rng = np.random.default_rng(derive("lab learning bootstrap"))
    seeds, problems = values.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(problems, size=(RESAMPLES, 1, problems))
    means = np.array([values[r, c].mean() for r, c in zip(rows, columns, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=sorted(TASKS), choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--group", type=int, default=16, help="responses per prompt")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--loss", default="dapo")
    options = parser.parse_args()
    runs = [(task_name, seed) for task_name in options.tasks for seed in range(options.seeds)]
    results = {run: finished(*run, options) for run in track(runs, "lab learning")}
    print(
        f"| task | before | after {options.steps} steps | gain (95 % interval) | seconds a run |\n|---|---|---|---|---|"
    )
    reached = []
    for task_name in options.tasks:
        mine = [results[task_name, seed] for seed in range(options.seeds)]
        before, after = (np.array([run[key] for run in mine]) for key in ("before", "after"))
        low, high = interval(after - before)
        reached.append(low >= BAR)
        gain = f"{(after - before).mean():+.3f} ({low:+.3f}, {high:+.3f})"
        seconds = np.mean([run["seconds"] for run in mine])
        print(f"| {task_name} | {before.mean():.3f} | {after.mean():.3f} | {gain} | {seconds:.0f} |")
    print(f"bar of {BAR:+.2f}: {'reached' if all(reached) else 'missed'}; {options.seeds} seeds, {HELD_OUT} problems")
    return 0 if all(reached) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
