"""Writing a subset for a trainer: data, ids, and config snippets of TRL, LLaMA-Factory and axolotl."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import make_folder, write_json, write_text
from tokencredit.recipes.pool.formats import WEIGHTS, is_trained
from tokencredit.recipes.pool.lines import write_lines
from tokencredit.recipes.pool.samples import Pool, Positions
from tokencredit.recipes.signals.store import model_of

DATA = "train.jsonl"
PLACEHOLDER = "YOUR_MODEL"


def export_subset(pool: Pool, positions: Positions, out: Path, format: str, *, model: str | None = None) -> list[Path]:
    """Write the files of one format, each whole or absent; text leaves the pool only here.

    Args:
      pool: the pool.
      positions: the subset, in the order of the recipe.
      out: folder to write to.
      format: a name of `FORMATS`.
      model: what the TRL script trains; by default the model that computed the pool's signals.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    make_folder(out)
    return FORMATS[format](pool, positions, out, model)


def _lines(pool: Pool, positions: Positions) -> Iterator[dict[str, Any]]:
    for sample in pool.samples(positions):
        line = {"messages": sample["messages"], "id": sample["id"], "source": sample["source"]}
        yield line | ({"tools": sample["tools"]} if sample.get("tools") else {})


def _jsonl(pool: Pool, positions: Positions, out: Path, model: str | None = None) -> list[Path]:
    write_lines(out / DATA, _lines(pool, positions))
    return [out / DATA]


def _ids(pool: Pool, positions: Positions, out: Path, model: str | None) -> list[Path]:
    pool.write_ids(positions, out / "train.ids")
    return [out / "train.ids"]


TRL = '''"""SFT on the exported recipe with TRL: every answer is trained, given what comes before it."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

MODEL = {model}
HERE = Path(__file__).parent
CHAT = AutoTokenizer.from_pretrained(MODEL).chat_template is not None


def rows(sample):
    """One row for each trained answer. A prompt and its completion need no marks in the chat template."""
    messages = sample["messages"]
    for place, message in enumerate(messages):
        trained = all(message.get(key, 1) for key in ("weight", "train", "training"))
        if message["role"] != "assistant" or not trained or place == 0:
            continue
        if CHAT:
            row = {{"prompt": messages[:place], "completion": [message]}}
            yield row | ({{"tools": sample["tools"]}} if "tools" in sample else {{}})
        else:
            before = "".join(earlier["content"] for earlier in messages[:place])
            yield {{"prompt": before, "completion": message["content"]}}


samples = [json.loads(line) for line in (HERE / "{data}").read_text(encoding="utf-8").splitlines()]
trainer = SFTTrainer(
    model=MODEL,
    train_dataset=Dataset.from_list([row for sample in samples for row in rows(sample)]),
    args=SFTConfig(output_dir=str(HERE / "out"), completion_only_loss=True, num_train_epochs=3, learning_rate=2e-5),
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


def _trl(pool: Pool, positions: Positions, out: Path, model: str | None) -> list[Path]:
    path = out / "train_trl.py"
    name = model or model_of(pool.folder) or PLACEHOLDER
    write_text(path, TRL.format(model=json.dumps(name), data=DATA))
    return [*_jsonl(pool, positions, out), path]


def _axolotl(pool: Pool, positions: Positions, out: Path, model: str | None) -> list[Path]:
    """axolotl knows one key for answers that are read and not trained, so they are written with `training`."""
    masked = any(not all(map(is_trained, sample["messages"])) for sample in pool.samples(positions))
    text = AXOLOTL.replace("{data}", DATA)
    if masked:
        text = text.replace("    roles_to_train: [assistant]\n", "    message_field_training: training\n")
    write_text(out / "axolotl.yaml", text)
    lines = _lines(pool, positions)
    write_lines(out / DATA, (_with_training(line) if masked else line for line in lines))
    return [out / DATA, out / "axolotl.yaml"]


def _with_training(line: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for message in line["messages"]:
        plain = {key: value for key, value in message.items() if key not in WEIGHTS}
        messages.append(plain | {"training": message["role"] == "assistant" and is_trained(message)})
    return line | {"messages": messages}


def _llamafactory(pool: Pool, positions: Positions, out: Path, model: str | None) -> list[Path]:
    """`dataset_info.json` for messages in OpenAI's form (`formatting: sharegpt` with renamed tags)."""
    for sample in pool.samples(positions):
        if sample.get("tools") or any(m.get("tool_calls") or not is_trained(m) for m in sample["messages"]):
            raise TokenCreditError(
                f"sample {sample['id']} has tools or an answer that is not trained, which this format cannot express",
                hint="export with --format jsonl, trl or axolotl",
            )
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
    write_json(path, info)
    return [*_jsonl(pool, positions, out), path]


FORMATS: dict[str, Callable[[Pool, Positions, Path, str | None], list[Path]]] = {
    "jsonl": _jsonl,
    "ids": _ids,
    "trl": _trl,
    "llamafactory": _llamafactory,
    "axolotl": _axolotl,
}
