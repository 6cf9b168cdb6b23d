"""Real GRPO runs whose responses depend on (step, row) alone: what any number of ranks must agree on."""

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl_setup import ALPHABET, config, trainer

from tokencredit import seeds
from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.methods.table import PRESETS
from tokencredit.pipeline.pipeline import get_pipeline

ROWS, GROUP = 24, 8  # three groups: over two ranks one is cut, over four all are
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, twice": {"gradient_accumulation_steps": 2, "num_iterations": 2},
}
# What a run has without a teacher, an adapter, a KL pass, vLLM or a collector.
FREE = (trl_checks.HOST_FIELDS - {"ref_logprobs", "rollout_logprobs"}) | {"attention_entropies"}
LORA = ("arca", "arca_released")
REFERENCE = ("policy_divergence",)
TOURED = [name for name in PRESETS if get_pipeline(name).requires <= FREE]


class Touring(CreditGRPOTrainer):
    """Every rollout batch under the next of `tour`, so that one start-up serves all presets."""

    tour: tuple[str, ...] = ()
    rollouts = 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.pipeline = get_pipeline(self.tour[self.rollouts])
        self.timing = trl_checks.resolve_timing("auto", self.pipeline, self.args)
        self.rollouts += 1
        return super()._generate_and_score_completions(inputs)


def rollout(prompts: list[str], host: Any) -> dict[str, Any]:
    """Random text of 1 to 7 characters and EOS; row 5 is empty but for EOS, row 9 is cut off before it."""
    first = host.accelerator.process_index * len(prompts)
    ids = []
    for row in range(first, first + len(prompts)):
        stream = seeds.generator("rows", host.state.global_step, row)
        length = 8 if row == 9 else int(torch.randint(1, 8, (), generator=stream))
        text = torch.randint(2, 2 + len(ALPHABET), (length,), generator=stream).tolist()
        ids.append([1] if row == 5 else text if row == 9 else [*text, 1])
    prompt_ids = host.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * len(row) for row in ids]}


def tiny_model(tokenizer: Any) -> Any:
    """In float64, so that a forward of another batch shape rounds away from no threshold; entropies well apart."""
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=1).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    return model


def save_reference(folder: Path) -> str:
    """The tiny model on disk: TRL loads a run's reference from the folder of its policy."""
    tokenizer = build_tokenizer(ALPHABET)
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(folder: Path, tour: list[str], shape: str, world: int, **extra: Any) -> dict[str, list[float]]:
    """Losses and gradient norms of one run over `tour`; its records lie in `folder`."""
    settings = SHAPES[shape] | extra.pop("settings", {})
    rows = ROWS // (world * settings.get("gradient_accumulation_steps", 1))
    steps = len(tour) * settings.get("num_iterations", 1)
    tokenizer = build_tokenizer(ALPHABET)
    built = trainer(
        Touring,
        config(folder / "out", per_device_train_batch_size=rows, num_generations=GROUP, max_steps=steps, **settings),
        **{"model": tiny_model(tokenizer), "credit": tour[0], "rollout_func": rollout, "records": folder} | extra,
    )
    built.tour = tuple(tour)
    built.train()
    logs = [log for log in built.state.log_history if "grad_norm" in log]
    return {"loss": [log["loss"] for log in logs], "norm": [log["grad_norm"] for log in logs]}


def train_all(folder: Path, reference: str, world: int) -> None:
    """All presets in all shapes, in one process group; `found.json` tells what they gave."""
    gc.freeze()  # a trainer collects garbage, and the imported hosts are none
    found = {}
    for shape in SHAPES:
        found[shape] = train(folder / shape, TOURED, shape, world)
    lora = LoraConfig(r=2, target_modules="all-linear")
    found["lora"] = train(folder / "lora", [*LORA, *LORA], "plain", world, peft_config=lora)
    beta = {"beta": 0.01, "model_init_kwargs": {"dtype": "auto"}}
    found["reference"] = train(folder / "reference", [*REFERENCE] * 2, "plain", world, model=reference, settings=beta)
    if world > 1:
        assert torch.distributed.get_world_size() == world  # some launchers start one process whatever they are told
        torch.distributed.barrier()
    if world == 1 or torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    print(f"seconds of CPU: {time.process_time():.1f}")
