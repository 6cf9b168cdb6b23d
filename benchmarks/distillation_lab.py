"""Distillation in the lab: position profile, prefix against suffix, IW-OPD against OPD and a constant; DASD.

A tiny student writes chains of sums, where an early slip spoils everything after it; its teacher is the same model
trained longer. Every method sees the same prompts, seed by seed; success on held-out problems is exact. Runs are files:
a killed script goes on where it was.

    python benchmarks/distillation_lab.py profile --out lab
    python benchmarks/distillation_lab.py opd     --out lab --seeds 5
    python benchmarks/distillation_lab.py dasd    --out lab --seeds 5
    python benchmarks/distillation_lab.py table   --out lab
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen3ForCausalLM, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import GRPOConfig

from tokencredit.adapters.trl import CreditGRPOTrainer
from tokencredit.collect.exact import encode_accepted, exact_credit
from tokencredit.collect.teacher_score import score_rows
from tokencredit.diagnostics.bootstrap import paired_bootstrap
from tokencredit.diagnostics.distillation import position_profile
from tokencredit.lab import supervised
from tokencredit.lab.model import SIZES, build_model, build_tokenizer
from tokencredit.lab.rollout import rollout_func
from tokencredit.lab.sampler import sample
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import Problem, Task, chain_task
from tokencredit.progress import track
from tokencredit.seeds import derive, generator

OPD = ("opd", "iw_opd", "iw_opd_constant", "iw_opd_unit_mass", "opd_decay", "opd_prefix", "opd_suffix", "opd_random")
DASD = ("grpo", "dasd", "dasd_permuted", "dasd_flipped", "dasd_conformity", "dasd_novelty", "rlsd")
EVALUATED = 64  # held-out problems
PRIVILEGED = "{answer}:{prompt}"  # what the teacher of DASD sees; the student is trained on both kinds of prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["profile", "opd", "dasd", "table"], default="table")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation-lab"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--terms", type=int, default=6, help="of a chain; a response has about 9 characters a term")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument(
        "--warm", type=int, default=400, help="supervised steps of the student; the teacher has twice as many more"
    )
    parser.add_argument("--rollouts", type=int, default=64, help="a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--methods", nargs="*", help="instead of the usual ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf_logging.disable_progress_bar()
    task = chain_task(terms=args.terms, sums=min(3, args.terms - 1))
    if args.what == "table":
        print(json.dumps(table(args.out), indent=1))
        return
    student, teacher = models(args, task, privileged=args.what == "dasd")
    if args.what == "profile":
        print(json.dumps(profile(student, teacher, task), indent=1))
        return
    methods = args.methods or list(OPD if args.what == "opd" else DASD)
    for seed in track(range(args.seeds), "seeds"):
        for method in methods:
            run(args, task, method, seed, student, teacher)
    print(json.dumps(table(args.out / args.what), indent=1))


# -- models ------------------------------------------------------------------------------------------------------------


def models(args: argparse.Namespace, task: Task, privileged: bool) -> tuple[Path, Path]:
    """Folders of the student and, for OPD, of the teacher: the student trained on, mostly on solved traces."""
    own = args.out / f"models-{task.name}-{args.size}-{args.warm}{'-privileged' if privileged else ''}"
    folders = own / "student", own / "teacher"
    tokenizer = build_tokenizer(task.alphabet)
    shown = with_answers(task) if privileged else task
    model = build_model(tokenizer, **SIZES[args.size]._asdict(), seed=0)
    for folder, share, steps in zip(folders, (0.3, 0.95), (args.warm, 2 * args.warm), strict=True):
        if (folder / "config.json").is_file():
            model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
            continue
        if folder is folders[1] and privileged:
            continue  # the student is its own teacher
        supervised.fit(model, tokenizer, shown, solved_share=share, steps=steps, batch=32, learning_rate=2e-3, seed=0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def with_answers(task: Task) -> Task:
    """Half of the prompts show the answer in front: a model that never saw one would not read it."""

    def draw(seed: int) -> Problem:
        problem = task.draw(seed)
        if random.Random(derive("shows answer", seed)).random() < 0.5:
            return problem
        return replace(problem, prompt=PRIVILEGED.format(answer=problem.data["answer"], prompt=problem.prompt))

    return replace(task, draw=draw)


# -- training ----------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Exact success on the held-out problems at the start and at some steps."""

    def __init__(self, task: Task, at: Sequence[int], tokenizer: Any) -> None:
        self.task, self.at, self.tokenizer = task, at, tokenizer
        self.problems = task.problems("test", EVALUATED)
        self.found: dict[int, list[float]] = {}

    def look(self, step: int, model: Any) -> None:
        was = model.training
        self.found[step] = success_probability(model, self.tokenizer, self.task, self.problems).tolist()
        model.train(was)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.at:
            self.look(state.global_step, model)


def run(args: argparse.Namespace, task: Task, method: str, seed: int, student: Path, teacher: Path) -> None:
    """One training run, written as a file when it is finished."""
    path = args.out / args.what / method / f"seed-{seed}.json"
    if path.is_file():
        return
    tokenizer = build_tokenizer(task.alphabet)
    model = Qwen3ForCausalLM.from_pretrained(student, dtype=torch.float32)
    data = rows_of(task, 512, seed)
    config = {"kind": "model", "model": str(teacher), "batch_size": 64}
    if args.what == "dasd":
        config = {"kind": "self", "template": PRIVILEGED, "batch_size": 64}
    watch = Watch(task, sorted({args.steps // 4, args.steps // 2, args.steps}), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CreditGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward_of(task),
            train_dataset=data,
            args=trainer_config(args, task, folder, seed),
            rollout_func=rollout_func,
            credit=method,
            teacher=config,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    path.write_text(json.dumps({"settings": settings, "success": watch.found, "log": trainer.state.log_history}))


def trainer_config(args: argparse.Namespace, task: Task, folder: str, seed: int) -> GRPOConfig:
    """Two rollouts a prompt for distillation, which has no group, eight where the verifier speaks."""
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.rollouts,
        num_generations=2 if args.what == "opd" else 8,
        max_completion_length=task.max_response,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        loss_type="grpo",  # seq-mean-token-mean, as the released code has it
        beta=0.0,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        activation_checkpointing=False,
    )


def rows_of(task: Task, count: int, seed: int) -> Dataset:
    """Prompts with the problem and, for the privileged teacher, its answer."""
    problems = task.problems("train", count, seed)
    return Dataset.from_dict(
        {
            "prompt": [problem.prompt for problem in problems],
            "answer": [problem.data["answer"] for problem in problems],
            "problem": [problem.to_json() for problem in problems],
        }
    )


def reward_of(task: Task) -> Any:
    def reward(completions: list[str], problem: list[str], **_: Any) -> list[float]:
        parsed = (Problem.from_json(text) for text in problem)
        return [float(task.verify(asked, text)) for asked, text in zip(parsed, completions, strict=True)]

    return reward


# -- results -----------------------------------------------------------------------------------------------------------


def table(folder: Path) -> dict[str, Any]:
    """Mean success of each method and its paired difference to the first method, at every evaluated step."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("seed-*.json")):
        runs.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())["success"]
    first = next((name for name in ("opd", "grpo") if name in runs), None)
    found: dict[str, Any] = {}
    for name, by_seed in runs.items():
        shared = sorted(by_seed.keys() & runs[first].keys()) if first else []
        found[name] = {"seeds": len(by_seed)}
        for step in next(iter(by_seed.values())):
            own = [by_seed[seed][step] for seed in shared]
            base = [runs[first][seed][step] for seed in shared]
            mean = statistics.mean(statistics.mean(row) for row in own)
            gap = paired_bootstrap(base, own)
            found[name][f"step {step}"] = f"{mean:.4f}" + (
                "" if name == first else f"  {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] to {first}"
            )
    return found


def profile(student: Path, teacher: Path, task: Task) -> dict[str, Any]:
    """Teacher–student gap by share of the way on the student's own rollouts, and the exact value of both there."""
    tokenizer = build_tokenizer(task.alphabet)
    own, other = (Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (student, teacher))
    problems = task.problems("test", EVALUATED)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in prompts])
    rollouts = sample(
        own,
        ids,
        mask,
        max_new_tokens=task.max_response,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator("profile"),
        num_return=4,
    )
    asked = [row for row in prompts for _ in range(4)]
    gaps = score_rows(other, asked, rollouts.ids, rollouts.mask) - score_rows(own, asked, rollouts.ids, rollouts.mask)
    lists = [encode_accepted(tokenizer, task.accepted(problem)) for problem in problems]
    which = torch.arange(len(problems)).repeat_interleave(4)
    result: dict[str, Any] = position_profile(gaps, rollouts.mask)
    for name, model in (("student", own), ("teacher", other)):
        exact = exact_credit(model, prompts, lists, eos_token_id=tokenizer.eos_token_id)
        values = exact.of_responses(which, rollouts.ids, rollouts.mask).values
        result[f"value_{name}"] = position_profile(values.float(), rollouts.mask)["mean"]
        result[f"success_{name}"] = round(float(exact.prompt_values.mean()), 4)
    return result


if __name__ == "__main__":
    main()
