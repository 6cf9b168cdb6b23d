"""Distillation in the lab: position profile, prefix against suffix, IW-OPD against OPD and a constant; DASD.

Two tasks. Countdown: short responses with forks, students of two sizes, the teacher a later stage of the larger one.
Chain: an early slip spoils everything after it; its teacher is the same model trained longer. For DASD the student is
taught to read a privileged prompt first. Every method sees the same prompts, seed by seed; success on held-out problems
is exact. Runs are files: a killed script goes on where it was.

    python benchmarks/distillation_lab.py models  --size mini
    python benchmarks/distillation_lab.py opd     --size mini --seeds 5
    python benchmarks/distillation_lab.py dasd    --size tiny --seeds 5 --beta 0.5
    python benchmarks/distillation_lab.py table   --what opd --size mini --baseline iw_opd_constant
    python benchmarks/distillation_lab.py profile --task chain --terms 4 --warm 250
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

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import GRPOConfig

from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.collect.exact.values import encode_accepted, exact_credit
from tokencredit.collect.teacher.score import score_rows
from tokencredit.collect.teacher.states import state_divergences
from tokencredit.diagnostics.position import position_profile
from tokencredit.diagnostics.stats import interval
from tokencredit.lab import supervised
from tokencredit.lab.cache import cache_root, cached_folder, fingerprint
from tokencredit.lab.data import load_model, load_tokenizer, reward_function
from tokencredit.lab.fused import fuse_norms
from tokencredit.lab.model import LEARNING_RATE, SIZES, Size, build_model, build_tokenizer, warm_start
from tokencredit.lab.rollout import rollout_func
from tokencredit.lab.sampler import sample
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import Problem, Task, chain_task, get_task
from tokencredit.progress import track
from tokencredit.seeds import derive, generator

OPD = ("opd", "iw_opd", "iw_opd_constant", "iw_opd_unit_mass", "opd_decay", "opd_prefix", "opd_suffix", "opd_random")
DASD = ("grpo", "dasd", "dasd_permuted", "dasd_flipped", "dasd_conformity", "dasd_novelty", "rlsd")
STUDENTS = SIZES | {"mini": Size(2, 64, 2)}
SETTINGS = ("task", "steps", "at", "terms", "size", "warm", "prompts", "rollouts", "learning_rate", "beta")
EVALUATED = 64  # held-out problems
PASSES = 8  # k of pass@k
PRIVILEGED = "{answer}:{prompt}"  # what the teacher of DASD sees; the student is trained on both kinds of prompt
COPIES = 0.7  # share of the privileged prompts whose response is the one that they show
READING = 400  # supervised steps in which a student learns to read privileged prompts


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf_logging.disable_progress_bar()
    task = get_task("countdown")
    if args.task == "chain":
        task = chain_task(terms=args.terms, sums=min(3, args.terms - 1))
    own = args.out / args.task / args.size / (args.what if args.beta is None else f"{args.what}-beta-{args.beta}")
    if args.command == "table":
        print(json.dumps(table(own, args.baseline), indent=1))
        return
    student, teacher = models(args, task)
    if args.command == "models":
        print(json.dumps(described(student, teacher, task), indent=1))
    elif args.command == "profile":
        print(json.dumps(profile(student, teacher, task), indent=1))
    else:
        for seed in track(range(args.seeds), "seeds"):
            for method in args.methods or list(OPD if args.what == "opd" else DASD):
                run(args, task, method, seed, student, teacher, own / method / f"seed-{seed}.json")
        print(json.dumps(table(own, args.baseline), indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["models", "profile", "opd", "dasd", "table"], default="table")
    parser.add_argument("--what", choices=["opd", "dasd"], default="opd", help="the models and runs that are meant")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation-lab"))
    parser.add_argument("--task", choices=["countdown", "chain"], default="countdown")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--at", type=int, nargs="*", help="steps after which to look, instead of four spread over the run"
    )
    parser.add_argument("--terms", type=int, default=6, help="of a chain; a response has about 9 characters a term")
    parser.add_argument("--size", choices=sorted(STUDENTS), default="tiny", help="of the student")
    parser.add_argument("--warm", type=int, help="supervised steps of the student, instead of the task's")
    parser.add_argument("--prompts", type=int, default=16, help="a step")
    parser.add_argument("--rollouts", type=int, default=8, help="of each prompt")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, help="of every arm of DASD, instead of the preset's")
    parser.add_argument("--methods", nargs="*", help="instead of the usual ones")
    parser.add_argument("--baseline", help="of the paired differences in the table; usually opd, or grpo for DASD")
    args = parser.parse_args()
    args.what = args.command if args.command in ("opd", "dasd") else args.what
    return args


# -- models ------------------------------------------------------------------------------------------------------------


def models(args: argparse.Namespace, task: Task) -> tuple[Path, Path]:
    """Folders of the student and of the teacher, cached; the student of DASD is its own teacher."""
    plain = countdown_student(args, task) if args.task == "countdown" else trained(args, task, "start", None, 0.3, 1.0)
    if args.what == "dasd":
        reader = trained(args, with_answers(task), "reader", plain, 0.3, READING / (args.warm or task.warm_steps))
        return reader, reader
    if args.task == "countdown":
        return plain, warm_start("countdown", stage="late")
    return plain, trained(args, task, "late", plain, 0.95, 2.0)


def countdown_student(args: argparse.Namespace, task: Task) -> Path:
    """The lab's own start where it has the size; else a model of that size, trained the same way."""
    if args.size in SIZES:
        return warm_start("countdown", size=args.size, steps=args.warm)
    solved = trained(args, task, "solved", None, 1.0, 0.6)
    return trained(args, task, "start", solved, 0.3, 0.4, rate=0.5)


def trained(
    args: argparse.Namespace, task: Task, name: str, after: Path | None, share: float, length: float, rate: float = 1.0
) -> Path:
    """The folder of a model trained on from `after` for `length` times the warm steps, `share` of the traces solved."""
    steps = max(1, round(length * (args.warm or task.warm_steps)))
    shape = STUDENTS[args.size]._asdict()
    settings = {"task": task.name, "name": name, "after": after and after.name, "share": share, "steps": steps, **shape}
    settings |= {"rate": rate * LEARNING_RATE, "copies": COPIES, "privileged": PRIVILEGED}

    def build(path: Path) -> dict[str, Any]:
        tokenizer = build_tokenizer(task.alphabet)
        model = build_model(tokenizer, **shape) if after is None else load_model(after)
        supervised.fit(
            model, tokenizer, task, solved_share=share, steps=steps, batch=32, learning_rate=settings["rate"], seed=0
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return {"parameters": model.num_parameters()}

    folder = cache_root() / "distillation-lab" / f"{task.name}-{args.size}-{name}-{fingerprint(settings)}"
    return cached_folder(folder, settings, build)


def with_answers(task: Task) -> Task:
    """Half of the prompts show the answer in front: a model that never saw one would not read it."""

    def draw(seed: int) -> Problem:
        problem = task.draw(seed)
        if random.Random(derive("shows answer", seed)).random() < 0.5:
            return problem
        return replace(problem, prompt=PRIVILEGED.format(answer=answer_of(task, problem), prompt=problem.prompt))

    def random_trace(problem: Problem, rng: random.Random, solved: bool | None) -> str:
        shown = problem.prompt.split(":")[0]
        if task.name.startswith("countdown") and problem.prompt != problem.key and rng.random() < COPIES:
            return shown
        return task.random_trace(problem, rng, solved)

    return replace(task, draw=draw, random_trace=random_trace)


def answer_of(task: Task, problem: Problem) -> str:
    """What the privileged prompt shows: the final answer, or on countdown, whose prompt names it, an accepted trace."""
    if "answer" in problem.data:
        return str(problem.data["answer"])
    return random.Random(derive("shown trace", problem.key)).choice(task.accepted(problem))


def described(student: Path, teacher: Path, task: Task) -> dict[str, Any]:
    """Exact success of both, on plain prompts and, where the student reads them, on privileged ones."""
    found: dict[str, Any] = {}
    problems = task.problems("test", EVALUATED)
    asked = [replace(p, prompt=PRIVILEGED.format(answer=answer_of(task, p), prompt=p.prompt)) for p in problems]
    for name, folder in (("student", student), ("teacher", teacher)):
        model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
        found[name] = {"folder": folder.name, "parameters": model.num_parameters()}
        found[name]["success"] = round(float(success_probability(model, tokenizer, task, problems).mean()), 4)
        if student == teacher:
            found[name]["privileged"] = round(float(success_probability(model, tokenizer, task, asked).mean()), 4)
    return found


# -- training ----------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """On held-out problems, at the start and at some steps: exact success, exact pass@k, KL to the teacher."""

    def __init__(self, task: Task, at: Sequence[int], tokenizer: Any, teacher: Path | None) -> None:
        self.task, self.at, self.tokenizer = task, at, tokenizer
        self.problems = task.problems("test", EVALUATED)
        self.teacher = None if teacher is None else load_model(teacher).eval()
        self.found: dict[str, dict[int, list[float]]] = {"success": {}, f"pass@{PASSES}": {}, "kl": {}}

    def look(self, step: int, model: Any) -> None:
        was = model.training
        success = success_probability(model, self.tokenizer, self.task, self.problems)
        self.found["success"][step] = success.tolist()
        self.found[f"pass@{PASSES}"][step] = (1.0 - (1.0 - success) ** PASSES).tolist()
        if self.teacher is not None:
            self.found["kl"][step] = divergence(model, self.teacher, self.tokenizer, self.problems, self.task)
        model.train(was)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.at:
            self.look(state.global_step, model)


def divergence(model: Any, teacher: Any, tokenizer: Any, problems: list[Problem], task: Task) -> list[float]:
    """KL of whole responses to the teacher, nats a problem: sums of full-vocabulary KLs over sampled states."""
    rollouts, asked = sampled(model, tokenizer, problems, task)
    found = state_divergences(model, teacher, asked, rollouts.ids, rollouts.mask, batch_size=256)
    return found.sum(1).view(len(problems), -1).mean(1).tolist()


def sampled(model: Any, tokenizer: Any, problems: list[Problem], task: Task, each: int = 4) -> tuple[Any, list]:
    """Responses to the problems, and the prompt ids of each."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in prompts])
    rollouts = sample(
        model,
        ids,
        mask,
        max_new_tokens=task.max_response,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator("profile"),
        num_return=each,
    )
    return rollouts, [row for row in prompts for _ in range(each)]


def run(args: argparse.Namespace, task: Task, method: str, seed: int, student: Path, teacher: Path, path: Path) -> None:
    """One training run, written as a file when it is finished; a file of other settings is refused."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"models": [student.name, teacher.name]}
    if path.is_file():
        before = json.loads(path.read_text())["settings"]
        other = [name for name, value in settings.items() if before.get(name) != value]
        if other:
            raise SystemExit(f"{path} was run with another {', '.join(other)}: choose another --out, or delete it")
        return
    tokenizer, model = load_tokenizer(student), load_model(student)
    model.set_attn_implementation("eager")
    fuse_norms(model)
    config: dict[str, Any] = {"kind": "model", "model": str(teacher), "batch_size": 128}
    if args.what == "dasd":
        config = {"kind": "self", "template": PRIVILEGED, "batch_size": 128}
    steps = args.at or sorted({max(1, args.steps * share // 6) for share in (1, 2, 4, 6)})
    watch = Watch(task, steps, tokenizer, teacher if args.what == "opd" else None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CreditGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward_function(task),
            train_dataset=rows_of(task, args.steps * args.prompts, seed),
            args=trainer_config(args, task, folder, seed),
            rollout_func=rollout_func,
            credit=method if args.beta is None or not method.startswith("dasd") else {method: {"beta": args.beta}},
            teacher=config,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".unfinished")
    written.write_text(json.dumps({"settings": settings, **watch.found, "log": trainer.state.log_history}))
    written.replace(path)


def trainer_config(args: argparse.Namespace, task: Task, folder: str, seed: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.prompts * args.rollouts,
        num_generations=args.rollouts,
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
    """Prompts with the problem and what the privileged teacher is shown."""
    problems = task.problems("train", count, seed)
    return Dataset.from_dict(
        {
            "prompt": [problem.prompt for problem in problems],
            "answer": [answer_of(task, problem) for problem in problems],
            "problem": [problem.to_json() for problem in problems],
        }
    )


# -- results -----------------------------------------------------------------------------------------------------------


def table(folder: Path, baseline: str | None = None) -> dict[str, Any]:
    """Mean of each method and its paired difference to the baseline, for every measure and evaluated step.

    Intervals are 95 % bootstrap over seeds and problems.
    """
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("seed-*.json")):
        runs.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    if baseline and baseline not in runs:
        raise SystemExit(f"{folder} has no runs of {baseline}; it has {', '.join(runs) or 'none at all'}")
    first = baseline or next((name for name in ("opd", "grpo") if name in runs), None)
    found: dict[str, Any] = {}
    for name, by_seed in runs.items():
        shared = sorted(by_seed.keys() & runs[first].keys()) if first else []
        found[name] = {"seeds": len(by_seed)}
        for measure in ("success", f"pass@{PASSES}", "kl"):
            for step in by_seed[shared[0]][measure] if shared else ():
                own, base = ([runs[who][seed][measure][step] for seed in shared] for who in (name, first))
                found[name][f"{measure}, step {step}"] = compared(own, None if name == first else base)
    return found


def compared(own: list[list[float]], base: list[list[float]] | None) -> str:
    """`0.4210  +0.0120 [+0.0040, +0.0200]`."""
    mean = f"{statistics.mean(statistics.mean(row) for row in own):.4f}"
    if base is None:
        return mean
    gap = interval(np.subtract(own, base))
    return f"{mean}  {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def profile(student: Path, teacher: Path, task: Task) -> dict[str, Any]:
    """Teacher–student gap by share of the way on the student's own rollouts, and the exact value of both there."""
    tokenizer = load_tokenizer(student)
    own, other = (load_model(path).eval() for path in (student, teacher))
    problems = task.problems("test", EVALUATED)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    rollouts, asked = sampled(own, tokenizer, problems, task)
    gaps = score_rows(other, asked, rollouts.ids, rollouts.mask) - score_rows(own, asked, rollouts.ids, rollouts.mask)
    lists = [encode_accepted(tokenizer, task.accepted(problem)) for problem in problems]
    which = torch.arange(len(problems)).repeat_interleave(4)
    result: dict[str, Any] = {"mean": tenths(gaps, rollouts.mask), "mean_abs": tenths(gaps.abs(), rollouts.mask)}
    for name, model in (("student", own), ("teacher", other)):
        exact = exact_credit(model, prompts, lists, eos_token_id=tokenizer.eos_token_id)
        values = exact.of_responses(which, rollouts.ids, rollouts.mask).values
        result[f"value_{name}"] = tenths(values, rollouts.mask)
        result[f"success_{name}"] = round(float(exact.prompt_values.mean()), 4)
    return result


def tenths(values: Tensor, mask: Tensor) -> list[float | None]:
    """The mean of each tenth of the responses; None where it has no tokens."""
    return [None if value != value else round(value, 4) for value in position_profile(values, mask).mean.tolist()]


if __name__ == "__main__":
    main()
