"""What does a teacher cost: memory against TRL's IW-OPD loss, time against the forward that cannot be avoided?

    python benchmarks/teacher.py memory          peak memory of one distillation loss and its backward, 152 K vocabulary
    python benchmarks/teacher.py time            teacher scoring against one no-grad forward of the same tokens
    python benchmarks/teacher.py step            a training step with a teacher against TRL's step plus that forward

Times are CPU time of one thread, interleaved, median and spread over the rounds. Memory is the process's resident peak
(VmHWM, reset before each part) minus what was resident before it, so a part's own buffers alone count.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit import TokenBatch, assign_credit
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.teacher.score import score_rows
from tokencredit.progress import track

VOCAB = 151_936


def model_of(vocab: int, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def peak_mib(part: Callable[[], Any]) -> float:
    """MiB above what was resident before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    part()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def memory(rows: int, prompt: int, response: int) -> dict[str, Any]:
    """TRL's `IWOPDTrainer.compute_loss` and backward, part by part against ours on the same tensors."""
    student, teacher = model_of(VOCAB, 128, 1, 0), model_of(VOCAB, 128, 1, 1).eval().requires_grad_(False)
    ids = torch.randint(0, VOCAB, (rows, prompt + response), generator=torch.Generator().manual_seed(2))
    losses: dict[str, float] = {}
    for parameter in student.parameters():  # gradients exist in both, so that neither pays for them
        parameter.grad = torch.zeros_like(parameter)

    def trl() -> None:
        loss = trl_loss(student, teacher, ids, prompt)
        losses["trl"] = loss.item()
        loss.backward()

    def ours(head: str) -> None:
        loss = our_loss(student, teacher, ids, prompt, head)
        losses[head] = loss.item()
        loss.backward()

    def scoring() -> None:
        score(teacher, ids, prompt)

    def their_teacher() -> None:
        with torch.no_grad():
            logits = teacher(input_ids=ids).logits[:, prompt - 1 : -1]
            logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])

    ours("host")  # the host's head patches the model's forward once
    ours("tiled")
    parts = {
        "trl": trl,
        "ours_tiled_head": lambda: ours("tiled"),
        "ours_host_head": lambda: ours("host"),
        "trl_teacher": their_teacher,
        "our_teacher": scoring,
    }
    found = {name: peak_mib(part) for name, part in parts.items()}
    if max(losses.values()) - min(losses.values()) > 1e-5:
        raise SystemExit(f"the losses differ: {losses}")
    return {
        "vocabulary": VOCAB,
        "tokens": rows * response,
        "logits_mib": rows * (prompt + response) * VOCAB * 4 / 2**20,
        **{f"{name}_mib": round(value, 1) for name, value in found.items()},
        "ratio_tiled_head": round(found["trl"] / found["ours_tiled_head"], 1),
        "ratio_host_head": round(found["trl"] / found["ours_host_head"], 1),
        "ratio_teacher": round(found["trl_teacher"] / max(found["our_teacher"], 0.1), 1),
        "loss": losses,
    }


def trl_loss(student: Any, teacher: Any, ids: Tensor, prompt: int) -> Tensor:
    """TRL's own `compute_loss`, on an object that has what it reads."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    trainer = IWOPDTrainer.__new__(IWOPDTrainer)
    trainer.__dict__ |= {
        "temperature": 1.0,
        "iw_opd_gamma": 0.5,
        "iw_opd_epsilon": 1e-8,
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "teacher_model": teacher,
        "use_teacher_server": False,
        "distillation_objective": "iw_opd",
        "_local_teacher_tokenizer_matches_student": True,
    }
    labels = ids.clone()
    labels[:, :prompt] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return IWOPDTrainer.compute_loss(trainer, student, inputs)


def score(teacher: Any, ids: Tensor, prompt: int) -> Tensor:
    mask = torch.ones_like(ids[:, prompt:], dtype=torch.bool)
    return score_rows(teacher, ids[:, :prompt].tolist(), ids[:, prompt:], mask, batch_size=8)


def our_loss(student: Any, teacher: Any, ids: Tensor, prompt: int, head: str) -> Tensor:
    """Teacher scoring, the student's log-probs, IW-OPD's credit."""
    taught = score(teacher, ids, prompt)
    response = ids[:, prompt:]
    logprobs = host_logprobs(student, ids, prompt) if head == "host" else tiled_logprobs(student, ids, prompt)
    batch = TokenBatch(
        response_ids=response,
        response_mask=torch.ones_like(response, dtype=torch.bool),
        rewards=torch.zeros(len(ids)),
        group_ids=torch.arange(len(ids)),
        old_logprobs=logprobs.detach(),
        teacher_logprobs=taught,
    )
    return -(logprobs * assign_credit("iw_opd", batch)).mean()


def host_logprobs(student: Any, ids: Tensor, prompt: int) -> Tensor:
    """As TRL's GRPO trainer computes them: its fused head, on a CPU in its fallback's tiles."""
    from trl.trainer.utils import add_fused_lm_head

    if not hasattr(student, "has_fused_head"):
        add_fused_lm_head(student, outputs=("log_probs", "entropy"))
        student.has_fused_head = True
    labels = ids.clone()
    labels[:, :prompt] = -100
    return student(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, prompt - ids.shape[1] :]


def tiled_logprobs(student: Any, ids: Tensor, prompt: int) -> Tensor:
    """Through `collect.head`."""
    hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    found, _ = head_logprobs(hidden.flatten(0, 1), student.get_output_embeddings().weight, ids[:, prompt:].flatten())
    return found.view(len(ids), -1)


def times(rounds: int) -> dict[str, Any]:
    """Scoring against the backbone-and-head forward without gradient, at two shapes."""
    shapes = {
        "lab: 98 tokens, hidden 96, 3 layers, 64 rows x (29 + 82)": (98, 96, 3, 64, 29, 82),
        "vocabulary 152 K, hidden 256, 2 layers, 4 rows x (32 + 96)": (VOCAB, 256, 2, 4, 32, 96),
    }
    result: dict[str, Any] = {}
    for name, (vocab, hidden, layers, rows, prompt, response) in shapes.items():
        model = model_of(vocab, hidden, layers, 0).eval()
        ids = torch.randint(0, vocab, (rows, prompt + response), generator=torch.Generator().manual_seed(1))
        parts = {
            "forward": lambda model=model, ids=ids, kept=response + 1: plain_forward(model, ids, kept),
            "score": lambda model=model, ids=ids, prompt=prompt, rows=rows: score_at(model, ids, prompt, rows),
        }
        result[name] = ratios(parts, rounds, base="forward")
    return result


def plain_forward(model: Any, ids: Tensor, kept: int) -> None:
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept, use_cache=False)


def score_at(model: Any, ids: Tensor, prompt: int, rows: int) -> None:
    mask = torch.ones_like(ids[:, prompt:], dtype=torch.bool)
    score_rows(model, ids[:, :prompt].tolist(), ids[:, prompt:], mask, batch_size=rows)


def ratios(parts: dict[str, Callable[[], Any]], rounds: int, base: str) -> dict[str, Any]:
    for part in parts.values():
        part()
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in track(range(rounds), "rounds"):
        for name, part in parts.items():
            start = time.thread_time()
            part()
            seconds[name].append(time.thread_time() - start)
    found: dict[str, Any] = {
        f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in seconds.items()
    }
    for name in parts.keys() - {base}:
        shares = sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
        found[f"{name} / {base}"] = {
            "median": round(statistics.median(shares), 3),
            "quartiles": [round(shares[len(shares) // 4], 3), round(shares[3 * len(shares) // 4], 3)],
        }
    return found


def step(rounds: int) -> dict[str, Any]:
    """`CreditGRPOTrainer` with IW-OPD and a teacher, against TRL's trainer and the teacher's bare forward."""
    from trl import GRPOTrainer

    from tokencredit.adapters.trl.trainer import CreditGRPOTrainer

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = step_times(GRPOTrainer, folder, rounds)
        taught = step_times(
            CreditGRPOTrainer, folder, rounds, credit="iw_opd", collectors={"teacher_logprobs": taught_by}
        )
    forward = statistics.median(BARE)
    floor = statistics.median(stock) + forward
    return {
        "stock_ms": round(1e3 * statistics.median(stock), 1),
        "teacher_forward_ms": round(1e3 * forward, 1),
        "with_teacher_ms": round(1e3 * statistics.median(taught), 1),
        "ratio": round(statistics.median(taught) / floor, 3),
        "score_ms": round(1e3 * statistics.median(SCORED), 1),
        "steps": len(stock),
    }


BARE: list[float] = []  # seconds of the teacher's bare forward on the rollouts of each step


def taught_by(rollout: Any) -> Tensor:
    """The teacher is the policy here: its size is what matters. The bare forward comes second, on warm memory."""
    start = time.thread_time()
    prompts = [row[mask].tolist() for row, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    found = score_rows(rollout.model, prompts, rollout.response_ids, rollout.response_mask, batch_size=len(prompts))
    SCORED.append(time.thread_time() - start)
    ids = torch.cat((rollout.prompt_ids, rollout.response_ids), 1)
    attention = torch.cat((rollout.prompt_mask, rollout.response_mask), 1).long()
    kept = rollout.response_ids.shape[1] + 1
    start = time.thread_time()
    with torch.no_grad():
        rollout.model(input_ids=ids, attention_mask=attention, logits_to_keep=kept, use_cache=False)
    BARE.append(time.thread_time() - start)
    return found


SCORED: list[float] = []


def step_times(trainer_class: Any, folder: str, rounds: int, **given: Any) -> list[float]:
    """CPU seconds of each optimizer step after the first, without the bare forward that only the measurement runs."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig

    from tokencredit.lab.data import prompt_dataset, reward_function
    from tokencredit.lab.model import build_model, build_tokenizer
    from tokencredit.lab.rollout import rollout_func
    from tokencredit.lab.tasks import get_task

    task = get_task("chain")
    tokenizer = build_tokenizer(task.alphabet)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.extra, self.start = sum(BARE), time.thread_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.thread_time() - self.start - (sum(BARE) - self.extra))

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=task.max_response,
        max_steps=rounds + 1,
        beta=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        logging_strategy="no",
    )
    trainer = trainer_class(
        model=build_model(tokenizer),
        processing_class=tokenizer,
        reward_funcs=reward_function(task),
        train_dataset=prompt_dataset(task, "train", 512),
        args=config,
        rollout_func=rollout_func,
        callbacks=[Clock()],
        **given,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["memory", "time", "step", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4, help="memory: rollouts")
    parser.add_argument("--response", type=int, default=128, help="memory: tokens of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: memory(args.rows, 16, args.response),
        "time": lambda: times(args.rounds),
        "step": lambda: step(args.rounds),
    }
    wanted = parts if args.what == "all" else [args.what]
    print(json.dumps({name: parts[name]() for name in wanted}, indent=1))


if __name__ == "__main__":
    main()
