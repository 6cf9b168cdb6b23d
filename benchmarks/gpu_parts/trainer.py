"""Sections E and G: a GRPO step at the shape of Qwen3-0.6B under every kind of credit, and real training."""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gpu_parts.measure import Bench
from tokencredit.adapters.trl.checks import checkpointing_field
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.cli.main import main as command_line
from tokencredit.collect.teacher.build import resolve_teacher
from tokencredit.collect.teacher.model import ModelTeacher
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.runs.train import quiet

ALPHABET = "0123456789+-=,:;"
PROMPT, GROUP, ROWS, STEPS = 64, 4, 4, 3  # rows of a micro-batch, two of which make a step; the first step warms up
OURS = ("_row_keys", "_collect", "_measure_old_policy", "_at_update")
COUNTDOWN = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
CURVES = ("grpo", "hapo", "forking_tokens", "surprisal")

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "identity": {"credit": "grpo"},
    "hapo, update": {"credit": "hapo", "timing": "update"},
    "hapo, rollout": {"credit": "hapo", "timing": "rollout"},
    "attention": {"credit": "attention"},
    "forking_tokens": {"credit": "forking_tokens"},
    "fipo": {"credit": "fipo"},
    "opd, a teacher in bf16": {"credit": "opd", "teacher": "model"},
    "opd, frozen self": {"credit": "opd", "teacher": {"kind": "self", "weights": "frozen"}},
    "LoRA, stock": {"lora": True},
    "LoRA, policy_divergence": {"credit": "policy_divergence", "lora": True},
    "LoRA, arca with KL": {"credit": "arca", "lora": True, "beta": 0.04},
    "stock again": {},
}


def model_of(bench: Bench, tokenizer: Any) -> Any:
    """Random weights: Qwen3-0.6B's shape, or a toy."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    if bench.tiny:
        shape |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    with bench.device:
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **ids, tie_word_embeddings=True, dtype="float32"))


class Rollouts:
    """Stands in for generation: the same random responses in every step and every variant."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary = length, vocabulary

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(0)
        shape = (len(prompts), self.length)
        ids = torch.randint(2, self.vocabulary, shape, generator=draws).tolist()
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * self.length for _ in ids]}


class Clock(TrainerCallback):
    """Seconds of each step, the device included; in the last step also of our own methods."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.steps, self.own, self.watching = bench, [], 0.0, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching = state.global_step == STEPS - 1
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.watching:
            self.steps.append(self._now() - self.start)

    def watch(self, trainer: Any) -> None:
        """Time the methods that the credit trainer adds. In the last step they wait for the device."""
        for name in OURS:
            method = getattr(trainer, name)
            setattr(trainer, name, lambda *args, method=method, **kwargs: self._timed(method, args, kwargs))

    def _timed(self, method: Any, args: Any, kwargs: Any) -> Any:
        if not self.watching:
            return method(*args, **kwargs)
        start = self._now()
        result = method(*args, **kwargs)
        self.own += self._now() - start
        return result

    def _now(self) -> float:
        self.bench.wait()
        return time.perf_counter()


def steps(bench: Bench) -> None:
    """E: seconds per step, ratio to stock, our own milliseconds, peak memory; checks of what must be exact."""
    quiet()
    length = bench.size(8192, 12)
    bench.say(f"E  trainer: {2 * ROWS} rows of {length} tokens, two micro-batches, bf16 autocast on a GPU")
    stock: float | None = None
    for name, variant in VARIANTS.items():
        bench.check_time(20.0 if bench.on_gpu else 2.0)
        try:
            numbers = _variant(bench, variant, length)
        except RuntimeError as error:  # out of memory
            bench.say(f"   {name:28s} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            bench.free()
            continue
        stock = stock or numbers["seconds"]
        note = numbers.get("check", "")
        bench.say(
            f"   {name:28s} {numbers['seconds']:8.3f} s/step {numbers['seconds'] / stock:6.3f} × stock "
            f"{numbers['own_ms']:9.1f} ms own {numbers['gib']:6.1f} GiB  {note}"
        )
        bench.keep("E", {name: numbers})


def _variant(bench: Bench, variant: dict[str, Any], length: int) -> dict[str, Any]:
    tokenizer = build_tokenizer(ALPHABET)
    model = model_of(bench, tokenizer)
    extra = {key: variant[key] for key in ("credit", "timing", "teacher") if key in variant}
    if extra.get("teacher") == "model":
        given = resolve_teacher({"kind": "model", "model": "random weights"})
        extra["teacher"] = ModelTeacher(model_of(bench, tokenizer).bfloat16(), tokenizer, given)
    with TemporaryDirectory() as folder:
        checked = extra.get("credit") in ("opd", "policy_divergence")
        if checked:
            extra["records"] = Path(folder) / "records"
        trainer = (CreditGRPOTrainer if extra else GRPOTrainer)(
            model=model,
            args=_arguments(bench, folder, length, variant.get("beta", 0.0)),
            processing_class=tokenizer,
            reward_funcs=_reward,
            train_dataset=Dataset.from_dict({"prompt": ["1+2=" * (PROMPT // 4)] * 64}),
            rollout_func=Rollouts(length, model.config.vocab_size),
            peft_config=LORA if variant.get("lora") else None,
            **extra,
        )
        clock = Clock(bench)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        if extra:
            clock.watch(trainer)
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        numbers: dict[str, Any] = {"seconds": min(clock.steps[1:] or clock.steps), "own_ms": clock.own * 1e3}
        numbers["gib"] = torch.cuda.max_memory_allocated() / 2**30 if bench.on_gpu else 0.0
        if checked:
            numbers["check"] = _check(extra["credit"], RecordStore(extra["records"]).read(0))
    del trainer, model, extra
    bench.free()
    return numbers


def _arguments(bench: Bench, folder: str, length: int, beta: float) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        num_generations=GROUP,
        max_completion_length=length,
        learning_rate=0.0,
        beta=beta,
        max_steps=STEPS,
        logging_steps=STEPS,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not bench.on_gpu,
        bf16=bench.on_gpu,
        **{checkpointing_field(GRPOConfig): bench.on_gpu},
    )


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 3) + index % 2 for index, text in enumerate(completions)]


def _check(credit: str, record: Any) -> str:
    """At step 0 a frozen copy is the policy, and a fresh adapter does nothing."""
    batch, mask = record.batch, record.batch.response_mask
    if credit == "opd":
        gap = batch.teacher_logprobs - batch.old_logprobs
        return f"max |ln ρ − ln π| {float(gap[mask].abs().max()):.1e}"
    weights = record.advantages[mask] / batch.host_advantages[:, None].expand(mask.shape)[mask]
    weights = weights[torch.isfinite(weights)]
    return f"weights {float(weights.min()):.6f}–{float(weights.max()):.6f}" if weights.numel() else ""


def quickstart(bench: Bench) -> None:
    """G: the quickstart's config on this device; a toy model for one step with `--tiny`."""
    bench.check_time(30.0 if bench.on_gpu else 5.0)
    values = ["steps=20", "evaluation.every=10", "records.every=5"]
    if bench.tiny:
        tokenizer = build_tokenizer(_alphabet())
        folder = bench.out / "model"
        build_model(tokenizer, layers=1, width=16, heads=2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        values = [f"model={folder}", "steps=1", "prompts_per_step=2", "trainer.num_generations=2"]
        values += ["evaluation.every=1", "evaluation.problems=2", "trainer.use_cpu=true"]
    settings = [item for value in values for item in ("--set", value)]
    start = time.monotonic()
    code = command_line(["train", str(COUNTDOWN), *settings, "--out", str(bench.out / "quickstart")])
    bench.say(f"G  quickstart: exit code {code} in {time.monotonic() - start:.0f} s; {bench.out / 'quickstart'}")
    bench.keep("G", {"quickstart": code})


def curves(bench: Bench, model: str) -> None:
    """`--train`: 60 steps of four methods and two seeds on a model, with the comparison's report."""
    settings = ["--set", f"model={model}", "--set", "steps=60"]
    start = time.monotonic()
    code = command_line(
        ["compare", str(COUNTDOWN), "--credit", *CURVES, "--seeds", "2", *settings, "--out", str(bench.out / "curves")]
    )
    bench.say(f"G  curves of {model}: exit code {code} in {time.monotonic() - start:.0f} s; {bench.out / 'curves'}")
    bench.keep("G", {"curves": code})


def _alphabet() -> str:
    from tokencredit.lab.tasks.countdown import ALPHABET as characters

    return characters
