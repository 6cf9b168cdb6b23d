"""Success on held-out problems: exact where the accepted responses can be listed, by sampling elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import Task


def evaluator(config: Mapping[str, Any], material: Any) -> Callable[[Any], dict[str, Any]] | None:
    """A function from the model to {"success", "per_problem"}; None where the config names nothing to evaluate on."""
    count = int(config["evaluation"]["problems"])
    if material.task is not None:
        return _exact(material.task, material.tokenizer, count)
    if config["dataset"]["evaluation"] is None:
        return None
    from tokencredit.runs.data import load_dataset_section

    rows = load_dataset_section(config["dataset"] | {"path": config["dataset"]["evaluation"]})
    chosen = rows.select(range(min(count, len(rows))))
    return _sampled(chosen, material, int(config["evaluation"]["samples"]))


def _exact(task: Task, tokenizer: Any, count: int) -> Callable[[Any], dict[str, Any]]:
    """V(x) = Σ_c π(c | x) over the accepted responses: no sampling noise, the same problems in every run."""
    problems = task.problems("test", count)

    def evaluate(model: Any) -> dict[str, Any]:
        values = success_probability(model, tokenizer, task, problems).tolist()
        return {"success": sum(values) / len(values), "per_problem": values}

    return evaluate


def _sampled(rows: Any, material: Any, samples: int) -> Callable[[Any], dict[str, Any]]:
    """Mean reward of `samples` responses to each prompt, from TRL-like sampling at temperature 1."""

    def evaluate(model: Any) -> dict[str, Any]:
        state = torch.get_rng_state()  # evaluation must not move the run's own stream
        try:
            torch.manual_seed(0)
            values = [_mean_reward(model, material, row, samples) for row in rows]
        finally:
            torch.set_rng_state(state)
        return {"success": sum(values) / len(values), "per_problem": values}

    return evaluate


@torch.no_grad()
def _mean_reward(model: Any, material: Any, row: Mapping[str, Any], samples: int) -> float:
    model.eval()
    prompt = row["prompt"]
    text = (
        prompt
        if isinstance(prompt, str)
        else material.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    )
    inputs = material.tokenizer(text, return_tensors="pt").to(model.device)
    ids = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=material.max_response,
    )[:, inputs["input_ids"].shape[1] :]
    texts = material.tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = {name: [value] * samples for name, value in row.items() if name != "prompt"}
    completions = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": item}] for item in texts]
    rewards = material.reward(prompts=[prompt] * samples, completions=completions, **columns)
    scored = [float(reward) for reward in rewards if reward is not None]
    return sum(scored) / max(1, len(scored))
