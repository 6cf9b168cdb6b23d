"""How concentrated four token signals are: before RL, after RL of all parameters, and after RL of LoRA at three ranks.

C1 asks whether concentration is caused by LoRA: the same signals on the model before any LoRA and any RL. C2 trains
all parameters beside LoRA at ranks 4, 16 and 64. C3 reads every signal at sharpening 1 and 2 from the same tensors. The
doubling ratio says whether the residual is signal. One model of the lab, GRPO by TRL, one thread, minutes; seeds differ
in adapters, rollouts and order of training.

    python experiments/concentration.py --seeds 2
    python experiments/concentration.py --seeds 3 --steps 40 --responses 1024
"""

import argparse
import copy
import json
import os
import tempfile
import warnings
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from tokencredit.collect.adapter_residual import adapter_residuals, doubling_ratio, policy_residuals
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.diagnostics.concentration import effective_token_ratio, gini
from tokencredit.lab import data
from tokencredit.lab.model import warm_start
from tokencredit.lab.rollout import rollout_func
from tokencredit.lab.sampler import sample
from tokencredit.lab.tasks import get_task
from tokencredit.methods.likelihood import entropy_drops, score_weights
from tokencredit.progress import track
from tokencredit.seeds import derive, generator

ARMS: dict[str, int | None] = {"full": None, "LoRA r=4": 4, "LoRA r=16": 16, "LoRA r=64": 64}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the paper's
GROUP = 16


class Responses(NamedTuple):
    """Sampled responses behind their left-padded prompts, GROUP to a prompt."""

    sequences: Tensor
    attention_mask: Tensor
    prompt_length: int
    ids: Tensor
    mask: Tensor
    correct: Tensor

    @property
    def span(self) -> tuple[Tensor, Tensor, int, int]:
        return self.sequences, self.attention_mask, self.prompt_length, self.ids.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help=f"of {GROUP} responses each, in a step")
    parser.add_argument("--responses", type=int, default=512, help="measured in each row of the table")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        start = data.load_model(warm_start(args.task))
        rows += measure("before RL", start, start, args, seed)
        for name, rank in track(ARMS.items(), f"seed {seed}"):
            rows += measure(name, trained(start, rank, args, seed), start, args, seed)
    if args.json:
        print(json.dumps(rows))
    else:
        show(rows, args)


def rollouts(model: Any, task_name: str, count: int, seed: int) -> Responses:
    """`count` responses to problems that training has not seen."""
    task, tokenizer = get_task(task_name), data.load_tokenizer(warm_start(task_name))
    problems = task.problems("test", count // GROUP, seed=1)
    encoded = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt", add_special_tokens=False)
    found = sample(
        model.eval(),
        encoded.input_ids,
        encoded.attention_mask,
        max_new_tokens=task.max_response,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator("concentration", task_name, seed),
        num_return=GROUP,
    )
    prompts = encoded.input_ids.repeat_interleave(GROUP, 0)
    seen = torch.cat((encoded.attention_mask.repeat_interleave(GROUP, 0), found.mask.long()), 1)
    ended = (found.ids == tokenizer.eos_token_id) & found.mask
    texts = tokenizer.batch_decode([row[m].tolist() for row, m in zip(found.ids, found.mask & ~ended, strict=True)])
    owners = [problem for problem in problems for _ in range(GROUP)]
    right = [bool(e) and task.verify(p, t) for e, p, t in zip(ended.any(1), owners, texts, strict=True)]
    whole = torch.cat((prompts, found.ids), 1)
    return Responses(whole, seen, prompts.shape[1], found.ids, found.mask, torch.tensor(right).float())


def trained(start: Any, rank: int | None, args: argparse.Namespace, seed: int) -> Any:
    """The model after GRPO, of all parameters or of a LoRA adapter, at learning rates that move both visibly."""
    model = copy.deepcopy(start)
    if rank is not None:
        torch.manual_seed(derive("concentration adapter", seed, rank))
        options = {"lora_alpha": 2 * rank, "target_modules": TARGETS, "lora_dropout": 0.0}
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, **options))
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.prompts * GROUP,
            num_generations=GROUP,
            max_completion_length=get_task(args.task).max_response,
            learning_rate=2e-4 if rank is None else 5e-4,
            lr_scheduler_type="constant",
            seed=seed,
            beta=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=data.load_tokenizer(warm_start(args.task)),
            reward_funcs=data.reward_function(args.task),
            train_dataset=data.prompt_dataset(args.task, "train", 512),
            args=config,
            rollout_func=rollout_func,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def measure(name: str, model: Any, start: Any, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Gini coefficient and effective-token ratio of each signal at p = 1 and 2, with their spread over responses."""
    got = rollouts(model, args.task, args.responses, seed)
    logprobs, entropies = token_logprobs(model, *got.span)
    signals = {"surprisal": -logprobs, "entropy reduction": entropy_drops(entropies, got.mask)}
    doubling = None
    if name != "before RL":
        lora = hasattr(model, "peft_config")
        found = adapter_residuals if lora else policy_residuals
        others = (model,) if lora else (model, start)
        residuals, reference = found(*others, *got.span, ref_temperature=1.0)
        assert reference is not None
        signals |= {"policy divergence": (logprobs - reference).abs(), "residual": residuals}
        doubling = doubling_ratio(model, *got.span) if lora else None
    rows = []
    for signal, scores in signals.items():
        row: dict[str, Any] = {"arm": name, "signal": signal, "seed": seed, "reward": float(got.correct.mean())}
        row["doubling"] = doubling if signal == "residual" else None
        for p in (1.0, 2.0):
            weights = score_weights(scores, got.mask, sharpening=p)
            for key, values in (("G", gini(weights, got.mask)), ("E", effective_token_ratio(weights, got.mask))):
                defined = values[torch.isfinite(values)]
                row[f"{key}{p:.0f}"] = float(defined.mean())
        rows.append(row | {"tokens": float(got.mask.sum(1).double().mean())})
    return rows


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    wide = max(16, 6 * args.seeds + 1)
    columns = ("G, p=1", "EffN/T", "G, p=2", "EffN/T", "doubling")
    print(f"{args.task}, {args.steps} steps of {args.prompts * GROUP} responses, {args.responses} measured, by seed")
    print(f"{'arm':12s}{'signal':20s}" + "".join(f"{name:{wide}s}" for name in columns) + "reward")
    for arm, signal in dict.fromkeys((row["arm"], row["signal"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["signal"]) == (arm, signal)]
        cells = [" ".join(f"{row[key]:.3f}" for row in mine) for key in ("G1", "E1", "G2", "E2")]
        cells.append(" ".join(f"{row['doubling']:.2f}" for row in mine if row["doubling"] is not None))
        reward = " ".join(f"{row['reward']:.3f}" for row in mine)
        print(f"{arm:12s}{signal:20s}" + "".join(f"{cell:{wide}s}" for cell in cells) + reward)
    print(f"mean response: {sum(row['tokens'] for row in rows) / len(rows):.1f} tokens")


if __name__ == "__main__":
    main()
