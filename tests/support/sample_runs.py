"""Run folders as training leaves them: synthetic batches through real pipelines. `python …/sample_runs.py FOLDER`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokencredit import CreditRecord, TokenBatch, assign_credit, get_pipeline
from tokencredit.batch.store import RecordStore
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.methods.outcome import group_normalized
from tokencredit.seeds import derive, generator

GROUP = 4
GAIN = {"grpo": 0.30, "hapo": 0.38, "forking_tokens": 0.22}


def sample_batch(step: int, seed: int, *, groups: int = 6, hostile: str = "") -> tuple[TokenBatch, list, list]:
    """Arithmetic traces: a choice has high entropy, a digit that follows has none. All methods get the same prompts."""
    rng = np.random.default_rng(derive("sample", step, seed))
    prompts_rng = np.random.default_rng(derive("sample prompts", step))
    prompts, tokens, entropies = [], [], []
    for _ in range(groups):
        a, b, c = prompts_rng.integers(1, 10, 3)
        for _ in range(GROUP):
            prompts.append(f"Use {a} {b} {c} to make {a + b - c}.\n")
            middle = rng.choice(["+", "-"], 2)
            text = f"{a} {middle[0]} {b}\n= {a + b} {middle[1]} {c}\n= {rng.integers(0, 20)}" + "." * rng.integers(0, 3)
            tokens.append([*text, hostile] if hostile else list(text))
            entropies.append([rng.gamma(4, 0.3) if x in "+-" else rng.gamma(0.3, 0.06) for x in tokens[-1]])
    length = max(map(len, tokens)) + 2
    rows = len(tokens)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    values = torch.full((rows, length), torch.nan)
    for row, found in enumerate(entropies):
        mask[row, : len(found)] = True
        values[row, : len(found)] = torch.tensor(found, dtype=torch.float32) * (1 - 0.006 * step)
    mask[1, 3:5] = False  # what an environment wrote
    rewards = (torch.rand(rows, generator=generator("rewards", step, seed)) < 0.2 + 0.004 * step).float()
    batch = TokenBatch(
        response_ids=torch.randint(0, 99, (rows, length), generator=generator("ids", step, seed)),
        response_mask=mask,
        rewards=rewards,
        group_ids=torch.arange(rows) // GROUP,
        entropies=values,
        progress=step / 100,
    )
    return batch, tokens, prompts


def with_teacher(batch: TokenBatch, step: int, seed: int) -> TokenBatch:
    """A teacher that disagrees more towards the end of a response and where the policy is unsure, less as it learns."""
    rng = generator("teacher", step, seed)
    way = torch.arange(batch.response_mask.shape[1]) / batch.response_mask.shape[1]
    spread = (0.1 + way) * (0.2 + batch.entropies) * (1.0 - 0.006 * step)  # type: ignore[operator]
    noise = torch.rand(batch.response_mask.shape, generator=rng)
    gap = spread * (torch.randn(batch.response_mask.shape, generator=rng) - 0.3)
    old = -noise - torch.nan_to_num(gap).clamp_min(0)  # neither log-prob is above 0
    return replace(batch, old_logprobs=old, teacher_logprobs=old + gap)


def write_run(
    folder: Path,
    label: str,
    seed: int,
    *,
    steps: int = 100,
    every: int = 1,
    status: str = "finished",
    records: bool = True,
    hostile: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """One run folder, a line `every` few steps; `hostile` is a token that ends every response."""
    folder.mkdir(parents=True)
    pipeline = get_pipeline(label)
    content = {
        "name": f"{label}/seed-{seed}",
        "task": "countdown",
        "model": "lab/tiny",
        "pipeline": pipeline.to_config(),
        "label": label,
        "seed": seed,
        "status": status,
        "versions": {"tokencredit": "0.1.0", "torch": torch.__version__},
        "settings": {"learning_rate": 3e-4, "steps": 100, "trainer": {"num_generations": GROUP, "loss_type": "dapo"}},
    }
    (folder / "run.json").write_text(json.dumps(content | dict(changes or {})))
    store = RecordStore(folder / "records")
    rng = np.random.default_rng(derive("evaluation", label, seed))
    hardness = np.random.default_rng(derive("problems")).random(64)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, steps + 1, every):
            batch, tokens, prompts = sample_batch(step, seed, hostile=hostile)
            host = group_normalized(batch)[:, 0].float()
            batch = replace(batch, host_advantages=host)
            if "teacher_logprobs" in pipeline.requires:
                batch = with_teacher(batch, step, seed)
            advantages = assign_credit(pipeline, batch, generator=generator("draw", step) if pipeline.draws else None)
            metrics = credit_metrics(batch, advantages, host) | {
                "reward": float(batch.rewards.mean()),
                "entropy": float(batch.entropies[batch.response_mask].mean()),
                "completions/mean_length": float(batch.response_mask.sum(1).float().mean()),
            }
            file.write(json.dumps({"step": step, "kind": "train", "metrics": metrics}) + "\n")
            if records and step % 25 == 0:
                store.append(
                    CreditRecord(
                        step=step,
                        pipeline=pipeline.to_config(),
                        batch=batch,
                        advantages=advantages,
                        tokens=tokens,
                        prompts=prompts,
                    )
                )
            if step % 20 == 0:
                skill = 0.2 + GAIN.get(label, 0.3) * (1 - np.exp(-step / 40)) + 0.02 * rng.normal()
                solved = (rng.random(64) + hardness) / 2 < skill
                line = {"step": step, "kind": "eval", "metrics": {"success": float(solved.mean())}}
                file.write(json.dumps(line | {"per_problem": solved.astype(float).tolist()}) + "\n")
    return folder


def write_comparison(
    folder: Path, labels: tuple[str, ...] = ("grpo", "hapo", "forking_tokens"), seeds: int = 3
) -> Path:
    """A comparison: a folder with one sub-folder a run."""
    names = [f"{label}/seed-{seed}" for label in labels for seed in range(seeds)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps({"runs": names, "labels": labels, "seeds": list(range(seeds))}))
    for label in labels:
        for seed in range(seeds):
            write_run(folder / label / f"seed-{seed}", label, seed)
    return folder


if __name__ == "__main__":
    write_comparison(Path(sys.argv[1]))
