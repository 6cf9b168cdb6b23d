"""Five steps with the defaults must not damage a pretrained model: what it knew and how it answers stay.

Needs SmolLM2-135M-Instruct as a Hugging Face folder, by default in the cache folder; skipped where it is absent.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.files import read_yaml
from tokencredit.runs.config.load import load_config
from tokencredit.runs.train import train_run

MODEL = Path(os.environ.get("TOKENCREDIT_PRETRAINED", "~/.cache/tokencredit/smollm2-135m-instruct")).expanduser()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model folder at {MODEL}"),
]

PARAGRAPH = (
    "The river rises in the mountains and flows through three countries before it reaches the sea. In spring the snow "
    "melts and the water is high; in late summer one can walk across it in many places. Most of the towns along its "
    "banks were built by merchants, who shipped timber and salt down the stream and came back on foot."
)
QUESTIONS = ("What is the capital of France?", "What is 3 + 4?", "Name a colour.", "How many legs has a spider?")

# Sizes that a CPU takes a minute for; everything that decides what a step does to the model stays at its default.
SMALL: dict[str, Any] = {"steps": 5, "prompts_per_step": 2, "records": {"every": 0}}
SMALL_TRAINER = {"num_generations": 4, "max_completion_length": 16}


def perplexity(model: Any, tokenizer: Any) -> float:
    ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss.exp())


def answer(model: Any, tokenizer: Any) -> list[int]:
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def write_questions(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": question, "answer": "x"}) + "\n" for question in QUESTIONS))
    return path


def load_trained(folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), folder)


@pytest.mark.parametrize("kind", ["example", "full"])
def test_five_steps_leave_the_model_intact(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = read_yaml(Path("examples/own_dataset.yaml"))
    config["dataset"]["path"] = str(write_questions(tmp_path))
    config |= SMALL | {"model": str(MODEL), "reward": "own_rewards:shorter_is_better"}
    config["trainer"] = config.get("trainer", {}) | SMALL_TRAINER
    if kind == "full":
        del config["lora"]
        config["trainer"].pop("learning_rate", None)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    before = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    train_run(load_config(config), tmp_path / "run")
    after = load_trained(tmp_path / "run" / "model")
    change = perplexity(after, tokenizer) / perplexity(before, tokenizer) - 1
    assert abs(change) < 0.02
    assert change != 0, "nothing was trained"
    assert answer(after, tokenizer)[-1] == tokenizer.eos_token_id
