"""What each collector adds to a GRPO step, against the same step without it, side by side in one run.

`--part trainer`: TRL's stock trainer against `CreditGRPOTrainer` on a warm start of the lab. The learning rate is 0, so
every variant samples and trains on the same rollouts. "own passes" gives the collectors a pass of their own, as a
collector of yours would run it. `own code` is the time inside what the credit trainer adds, taps included, as a share
of the step: the column least exposed to noise.

`--part step`: a step is written out here: sampling, the scoring passes, forward and backward of the policy gradient, on
a LoRA model of the lab's shape with fresh weights. "own pass" collectors run a pass for themselves; "tapped" ones read
one that the step runs anyway. Memory is the peak above what was there before the step.

CPU time of one thread, variants interleaved.

    python benchmarks/collectors.py
    python benchmarks/collectors.py --part trainer --prompts 32 --rounds 6
    python benchmarks/collectors.py --part step --rows 256 --response 64 --rounds 9
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from head import clock, peak
from overhead import StepClock, measure, report, show
from torch import Tensor

from tokencredit.adapters.trl.taps import PassTaps
from tokencredit.collect.adapter_residual import adapter_residuals, capture_states, reference_pass
from tokencredit.collect.attention import entropies as attention
from tokencredit.collect.attention.entropies import attention_entropies, middle_layer, probe_attention
from tokencredit.collect.attention.rows import row_statistics
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.models import eval_mode
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.sampler import sample
from tokencredit.progress import track
from tokencredit.runs.train import quiet

PROMPT = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Step:
    """One GRPO step on fixed prompts, in parts."""

    def __init__(self, rows: int, response: int) -> None:
        tokenizer = build_tokenizer("0123456789+-=,:;abcdefghij")
        torch.manual_seed(0)
        base = build_model(tokenizer, layers=4, width=128, heads=4)
        self.model: Any = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        self.prompts = torch.randint(2, len(tokenizer), (rows // 8, PROMPT))
        self.response = response
        self.ids = torch.randint(2, len(tokenizer), (rows, PROMPT + response))
        self.mask = torch.ones_like(self.ids)
        self.span = (self.ids, self.mask, PROMPT, response)

    def rollout(self) -> None:
        draws = torch.Generator().manual_seed(1)
        options = {"max_new_tokens": self.response, "eos_token_id": 1, "generator": draws, "num_return": 8}
        sample(self.model, self.prompts, torch.ones_like(self.prompts), **options)

    def score(self) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.model, *self.span)

    def reference(self) -> tuple[Tensor, Tensor]:
        with reference_pass(self.model):
            return token_logprobs(self.model, *self.span)

    def update(self) -> None:
        logits = self.model(self.ids, attention_mask=self.mask).logits[:, PROMPT - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(2, self.ids[:, PROMPT:, None])
        logprobs.mean().backward()


def variants(step: Step) -> dict[str, dict[str, Callable[[], Any]]]:
    """Families of steps; the first of each is what the others are compared with."""
    layer = middle_layer(step.model)
    rows = slice(PROMPT - 1, PROMPT - 1 + step.response)
    measure = lambda seen: row_statistics(replace(seen, rows=rows))  # noqa: E731

    def together(*parts: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [part() for part in (step.rollout, *parts, step.update)]

    def tapped_attention() -> None:
        with eval_mode(step.model), probe_attention(step.model, [layer], measure):
            step.score()

    def tapped_residual() -> Tensor:
        with capture_states(step.model, step.response) as tap:
            step.score()
            step.reference()
        return tap.residuals()

    entropies = lambda: attention_entropies(step.model, *step.span)  # noqa: E731
    residual = lambda: adapter_residuals(step.model, *step.span)  # noqa: E731
    return {
        "no KL, no scoring pass": {
            "stock": together(),
            "log-probs and entropies, own pass": together(step.score),
            "attention entropy, own pass": together(entropies),
            "ARCA, own two passes": together(residual),
        },
        "no KL, scoring pass": {
            "stock": together(step.score),
            "attention entropy, tapped": together(tapped_attention),
            "ARCA, one more pass": together(lambda: _one_more(step)),
        },
        "KL and scoring pass": {
            "stock": together(step.score, step.reference),
            "attention entropy, tapped": together(tapped_attention, step.reference),
            "ARCA, tapped": together(tapped_residual),
            "ARCA as released: two more": together(step.score, step.reference, residual),
        },
    }


def _one_more(step: Step) -> Tensor:
    with capture_states(step.model, step.response) as tap:
        step.score()
        with torch.no_grad(), eval_mode(step.model), reference_pass(step.model):
            step.model.get_base_model().base_model(step.ids, attention_mask=step.mask, use_cache=False)
    return tap.residuals()


OWN_PASSES: dict[str, Any] = {
    "attention_entropies": lambda rollout: attention_entropies(rollout.model, *rollout.sequences()),
    "adapter_residuals": lambda rollout: adapter_residuals(rollout.model, *rollout.sequences())[0],
}
LORA = peft.LoraConfig(r=16, target_modules=TARGETS)
# By family: settings of the trainer, and the arguments of each variant; none is TRL's own trainer.
TRAINERS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "full fine-tuning, no KL": (
        {},
        {
            "stock": {},
            "attention entropy": {"credit": "attention"},
            "attention entropy, own pass": {"credit": "attention", "collectors": OWN_PASSES},
        },
    ),
    "LoRA, no KL": (
        {"lora": LORA},
        {"stock": {}, "attention entropy": {"credit": "attention"}, "ARCA, one pass": {"credit": "arca"}},
    ),
    "LoRA, KL": (
        {"lora": LORA, "beta": 0.04},
        {
            "stock": {},
            "attention entropy": {"credit": "attention"},
            "ARCA": {"credit": "arca"},
            "ARCA, own two passes": {"credit": "arca", "collectors": OWN_PASSES},
        },
    ),
}


def trainers(args: argparse.Namespace) -> None:
    """One table a family."""
    quiet()
    print(
        f"{args.prompts * 16} responses of at most 20 tokens, countdown's tiny model, {args.rounds * args.steps} steps"
    )
    for title, (settings, variants) in TRAINERS.items():
        rows = report(*measure(variants, args, title=title, during=taps_counted, **settings))
        print()
        show(title, rows)


@contextmanager
def taps_counted(step_clock: StepClock) -> Iterator[None]:
    """What taps do inside the host's passes is on the clock too: setting up, taking down, and row statistics."""
    around, statistics_of_rows = PassTaps.around, attention.row_statistics

    @contextmanager
    def counted(*args: Any, **kwargs: Any) -> Iterator[None]:
        tap = around(*args, **kwargs)
        step_clock.counted(tap.__enter__)()
        yield
        step_clock.counted(tap.__exit__)(None, None, None)

    PassTaps.around, attention.row_statistics = counted, step_clock.counted(statistics_of_rows)
    try:
        yield
    finally:
        PassTaps.around, attention.row_statistics = around, statistics_of_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["trainer", "step", "both"], default="both")
    parser.add_argument("--prompts", type=int, default=16, help="of 16 responses each, in a step of the trainer")
    parser.add_argument("--steps", type=int, default=3, help="of the trainer, in each round")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part in ("trainer", "both"):
        trainers(args)
    if args.part in ("step", "both"):
        steps(args)


def steps(args: argparse.Namespace) -> None:
    step = Step(args.rows, args.response)
    print(f"{args.rows} responses of {args.response} tokens, prompts of {PROMPT}; LoRA r=16 on 4 layers of width 128")
    for title, found in variants(step).items():
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in track(range(args.rounds + 1), title):
            for name, run in found.items():
                spent = clock(run)
                if turn:  # the first round warms up
                    times[name].append(spent)
        print(f"\n{title:36s}ratio  middle half      peak MiB")
        for name, run in found.items():
            ratios = [mine / stock for mine, stock in zip(times[name], times["stock"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{name:36s}{middle:5.3f}  {low:.3f}-{high:.3f}  {peak(run, backward=False):8.1f}")


if __name__ == "__main__":
    main()
