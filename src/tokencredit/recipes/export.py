"""Writing a subset for a trainer: data, ids, and config snippets of TRL, LLaMA-Factory and axolotl."""

import json
from collections.abc import Callable
from pathlib import Path

from tokencredit.errors import unknown
from tokencredit.recipes.pool import Pool, Positions

DATA = "train.jsonl"


def export_subset(pool: Pool, positions: Positions, out: Path, format: str) -> list[Path]:
    """The files of one format, written whole; text leaves the pool only here."""
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    out.mkdir(parents=True, exist_ok=True)
    return FORMATS[format](pool, positions, out)


def _jsonl(pool: Pool, positions: Positions, out: Path) -> list[Path]:
    path = out / DATA
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for sample in pool.samples(positions):
            line = {"messages": sample["messages"], "id": sample["id"], "source": sample["source"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(path)
    return [path]


def _ids(pool: Pool, positions: Positions, out: Path) -> list[Path]:
    path = out / "train.ids"
    path.write_bytes(b"\n".join(pool.ids[positions].tolist()) + b"\n")
    return [path]


TRL = '''"""SFT on the exported recipe with TRL."""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="{data}", split="train").select_columns(["messages"])
trainer = SFTTrainer(
    model="YOUR_MODEL",
    train_dataset=dataset,
    args=SFTConfig(output_dir="out", assistant_only_loss=True, num_train_epochs=3, learning_rate=2e-5),
)
trainer.train()
'''

AXOLOTL = """datasets:
  - path: {data}
    ds_type: json
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: [assistant]
train_on_inputs: false
"""


def _trl(pool: Pool, positions: Positions, out: Path) -> list[Path]:
    path = out / "train_trl.py"
    path.write_text(TRL.replace("{data}", DATA), encoding="utf-8")
    return [*_jsonl(pool, positions, out), path]


def _axolotl(pool: Pool, positions: Positions, out: Path) -> list[Path]:
    path = out / "axolotl.yaml"
    path.write_text(AXOLOTL.replace("{data}", DATA), encoding="utf-8")
    return [*_jsonl(pool, positions, out), path]


def _llamafactory(pool: Pool, positions: Positions, out: Path) -> list[Path]:
    """`dataset_info.json` for messages in OpenAI's form (`formatting: sharegpt` with renamed tags)."""
    info = {
        "recipe": {
            "file_name": DATA,
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
                "observation_tag": "tool",
            },
        }
    }
    path = out / "dataset_info.json"
    path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return [*_jsonl(pool, positions, out), path]


FORMATS: dict[str, Callable[[Pool, Positions, Path], list[Path]]] = {
    "jsonl": _jsonl,
    "ids": _ids,
    "trl": _trl,
    "llamafactory": _llamafactory,
    "axolotl": _axolotl,
}
