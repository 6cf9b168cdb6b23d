"""How fast is a GRPO step of the tiny model, against its own matrix products?

In one process, in turn, several rounds: TRL's step with stock generation, with `tokencredit.lab.rollout.rollout_func`,
with that and `tokencredit.lab.fused.fuse_norms`, and the floor. The floor replays every matrix product of one step
(rollout, forward, backward), recorded from the step itself, as bare `torch.mm` and `torch.bmm` on operands of the
recorded sizes and strides, outputs allocated before. Times are CPU time of this thread; ratios are within a round.

    python benchmarks/step_floor.py --rounds 5 --steps 3
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging
from trl import GRPOConfig, GRPOTrainer

from tokencredit.lab.fused import fuse_norms
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.rollout import rollout_func
from tokencredit.lab.tasks import Problem, get_task
from tokencredit.progress import track

aten = torch.ops.aten
Product = tuple[str, tuple[Any, ...]]  # phase, ((size, stride) of each operand)
VARIANTS = ("stock generate", "rollout_func", "rollout_func, fused norms")
# Phases in the order of a step: method of the trainer (or of a part of it) that is timed as this phase.
PHASES = {
    "rollout": "_generate",
    "reward": "_calculate_rewards",
    "batch": "_generate_and_score_completions",
    "forward": "_get_per_token_logps_and_entropies",
    "loss": "_compute_loss",
    "backward": "accelerator.backward",
    "optimizer": "optimizer.step",
    "step": "training_step",
}


class Phases:
    """CPU time of each phase without the phases inside it; what no phase covers is `trainer loop`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = ["trainer loop"]
        self.last = time.thread_time()

    def _charge(self) -> None:
        now = time.thread_time()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        self._charge()
        self.stack.append(phase)
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def wrap(self, owner: object, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.inside(phase):
                return original(*args, **kwargs)

        setattr(owner, name, timed)


class Recorder(TorchDispatchMode):
    """Notes sizes and strides of every matrix product, with the phase that runs it."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self.phases = phases
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operands in _products(func, args):
            self.products.append((self.phases.stack[-1], tuple((tuple(x.shape), x.stride()) for x in operands)))
        return func(*args, **(kwargs or {}))


def _products(func: Any, args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """The pairs that `func` multiplies. A fused attention is two products forward and four backward."""
    packet = func.overloadpacket
    if packet in (aten.mm, aten.bmm):
        return [(args[0], args[1])]
    if packet in (aten.addmm, aten.addmm_, aten.baddbmm):
        return [(args[1], args[2])]
    if packet is getattr(torch.ops.mkldnn, "_linear_pointwise", None):
        return [(args[0].flatten(0, -2), args[1].t())]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        q, k, v = (x.flatten(0, 1) for x in args[:3])
        return [(q, k.mT), (q.new_empty(*q.shape[:2], k.shape[1]), v)]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        out, q, k, v = (x.flatten(0, 1) for x in args[:4])
        scores = q.new_empty(*q.shape[:2], k.shape[1])
        return [(scores.mT, out), (out, v.mT), (scores, k), (scores.mT, q)]
    return []


def replay(products: list[Product]) -> Callable[[], dict[str, float]]:
    """A function that runs the products once and returns CPU seconds by phase."""
    operands: dict[tuple[Any, ...], tuple[Callable[..., Any], Tensor, Tensor, Tensor]] = {}
    for _, key in products:
        if key not in operands:
            a, b = (torch.empty_strided(size, stride).normal_() for size, stride in key)
            out = torch.empty(*a.shape[:-1], b.shape[-1])
            operands[key] = (torch.mm if a.dim() == 2 else torch.bmm, a, b, out)
    by_phase: dict[str, list[Any]] = defaultdict(list)
    for phase, key in products:
        by_phase[phase].append(operands[key])

    def run() -> dict[str, float]:
        seconds = {}
        with torch.no_grad():
            for phase, calls in by_phase.items():
                start = time.thread_time()
                for multiply, a, b, out in calls:
                    multiply(a, b, out=out)
                seconds[phase] = time.thread_time() - start
        return seconds

    return run


def flops(products: list[Product]) -> float:
    total = 0
    for _, ((left, _), (right, _)) in products:
        total += 2 * left[-1] * right[-1] * (left[0] * left[1] if len(left) == 3 else left[0])
    return total


class Clock(TrainerCallback):
    """CPU time of every optimizer step after the first, and a dispatch mode around one step if there is one."""

    def __init__(self, mode: TorchDispatchMode | None = None, phases: Phases | None = None) -> None:
        self.seconds: list[float] = []
        self.mode, self.phases = mode, phases

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.mode is not None and state.global_step == 1:
            self.mode.__enter__()
        if self.phases is not None and state.global_step == 1:
            self.phases.seconds.clear()
        self.start = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.thread_time() - self.start)
        if self.mode is not None and state.global_step == 2:
            self.mode.__exit__(None, None, None)


def dataset(count: int) -> Dataset:
    problems = get_task("countdown").problems("train", count)
    return Dataset.from_list([{"prompt": p.prompt, "problem": p.to_json()} for p in problems])


def solved(completions: list[str], problem: list[str], **_: Any) -> list[float]:
    verify = get_task("countdown").verify
    return [float(verify(Problem.from_json(p), text)) for p, text in zip(problem, completions, strict=True)]


def make_trainer(options: argparse.Namespace, *, variant: str, callback: Clock, steps: int) -> GRPOTrainer:
    """A trainer with the settings of docs/results/costs.md, but for what the options say."""
    tokenizer = build_tokenizer(get_task("countdown").alphabet)
    model = build_model(tokenizer)
    if options.kv_heads:
        model = type(model)._from_config(_with_kv_heads(model.config, options.kv_heads))
    model.set_attn_implementation(options.attention)
    if variant == VARIANTS[-1]:
        fuse_norms(model)
    rows = options.prompts * options.group
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": rows // options.micro_batch,
        "num_generations": options.group,
        "max_completion_length": options.response,
        "max_steps": steps + 1,
        "learning_rate": 3e-4,
        "beta": 0.0,
        "gradient_checkpointing": options.checkpointing,
        "bf16": False,
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": 0,
        "logging_steps": 10,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=solved,
        args=GRPOConfig(**settings),
        train_dataset=dataset(8 * options.prompts),
        processing_class=tokenizer,
        rollout_func=None if variant == VARIANTS[0] else rollout_func,
        callbacks=[callback],
    )
    # The trainer prints its logs where no progress bar is shown; standard output belongs to this benchmark.
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    return trainer


def _with_kv_heads(config: Any, kv_heads: int) -> Any:
    config.num_key_value_heads = kv_heads
    return config


def step_seconds(options: argparse.Namespace, variant: str) -> float:
    clock = Clock()
    make_trainer(options, variant=variant, callback=clock, steps=options.steps).train()
    return statistics.median(clock.seconds)


def record(options: argparse.Namespace) -> list[Product]:
    """The matrix products of one step of the fastest variant."""
    phases = Phases()
    recorder = Recorder(phases)
    _instrument(make_trainer(options, variant=VARIANTS[-1], callback=Clock(recorder), steps=1), phases).train()
    return recorder.products


def phase_seconds(options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of each phase of a step of the fastest variant, the first step left out."""
    phases = Phases()
    clock = Clock(phases=phases)
    _instrument(make_trainer(options, variant=VARIANTS[-1], callback=clock, steps=options.steps), phases).train()
    covered = {name: phases.seconds[name] / options.steps for name in PHASES}
    return covered | {"trainer loop": max(statistics.mean(clock.seconds) - sum(covered.values()), 0.0)}


def _instrument(trainer: GRPOTrainer, phases: Phases) -> GRPOTrainer:
    trainer.create_optimizer()
    for phase, path in PHASES.items():
        owner: Any = trainer
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        phases.wrap(owner, name, phase)
    return trainer


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    floor = result["floor"]
    print(f"tiny model, {options.prompts} prompts x {options.group}, up to {options.response} tokens, one thread")
    print(f"medians (ranges) of {options.rounds} rounds of {options.steps} steps; {result['gflop']:.1f} GFLOP a step")
    print(f"  {'':<28}{'CPU seconds a step':<28}{'over the floor':<24}over stock")
    for variant in VARIANTS:
        seconds = result[variant]
        over_floor = spread([a / b for a, b in zip(seconds, floor, strict=True)])
        over_stock = spread([a / b for a, b in zip(seconds, result[VARIANTS[0]], strict=True)])
        print(f"  {variant:<28}{spread(seconds):<28}{over_floor:<24}{over_stock}")
    print(f"  {'floor: its products alone':<28}{spread(floor)}")
    print(f"where a step of '{VARIANTS[-1]}' goes: seconds, its products, the rest")
    for phase, seconds in result["phases"].items():
        products = result["floor_phases"].get(phase, 0.0)
        print(f"  {phase:<28}{seconds:8.3f}{products:8.3f}{seconds - products:8.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run (one more warms up)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--response", type=int, default=24, help="longest response in tokens")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--kv-heads", type=int, default=0, help="key-value heads; 0 keeps the model's own")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    hf_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    products = record(options)
    run = replay(products)
    result: dict[str, Any] = defaultdict(list, gflop=flops(products) / 1e9)
    phases, floor_phases = defaultdict(list), defaultdict(list)
    for _ in track(range(options.rounds), "rounds"):
        floors = [run()]
        for variant in VARIANTS:
            result[variant].append(step_seconds(options, variant))
            floors.append(run())
        result["floor"].append(statistics.median(sum(floor.values()) for floor in floors))
        for phase, seconds in phase_seconds(options).items():
            phases[phase].append(seconds)
            floor_phases[phase].append(statistics.median(floor.get(phase, 0.0) for floor in floors))
    result["phases"] = {phase: statistics.median(values) for phase, values in phases.items()}
    result["floor_phases"] = {phase: statistics.median(values) for phase, values in floor_phases.items()}
    result["products"] = dict(Counter(phase for phase, _ in products))
    print(json.dumps(result)) if options.json else report(options, result)


if __name__ == "__main__":
    main()
