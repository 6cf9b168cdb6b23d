"""A real GRPO run in seconds: a fresh Qwen3 with a character tokenizer, a reward that varies within groups."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig

from tokencredit.adapters.trl.checks import checkpointing_field
from tokencredit.lab.model import build_model, build_tokenizer

ALPHABET = "0123456789+=,"


def dataset(rows: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{index}+{index + 1}=" for index in range(rows)]})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(character in "13579" for character in text)) / 8.0 for text in completions]


def config(folder: Path, **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        checkpointing_field(GRPOConfig): False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return GRPOConfig(**settings | changes)


def saved_model(folder: Path) -> str:
    tokenizer = build_tokenizer(ALPHABET)
    build_model(tokenizer, layers=2, width=32, heads=2, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(kind: type, arguments: GRPOConfig, **extra: Any) -> Any:
    tokenizer = build_tokenizer(ALPHABET)
    settings = {"reward_funcs": reward, "train_dataset": dataset(), "processing_class": tokenizer} | extra
    if "model" not in settings:
        settings["model"] = build_model(tokenizer, layers=2, width=32, heads=2, seed=1)
    return kind(args=arguments, **settings)


def outcome(trained: Any) -> dict[str, Any]:
    """Everything that must agree bit for bit: losses, gradient norms, final weights."""
    logs = [
        {key: log[key] for key in ("loss", "grad_norm", "reward") if key in log} for log in trained.state.log_history
    ]
    weights = [value.detach().double().sum().item() for value in trained.model.parameters()]
    digest = [hash(value.detach().numpy().tobytes()) for value in trained.model.parameters()]
    return {"logs": logs, "weights": weights, "digest": digest}


def train(kind: type, arguments: GRPOConfig, **extra: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    built = trainer(kind, arguments, **extra)
    built.train()
    return outcome(built)
