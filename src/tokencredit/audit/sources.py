"""Responses that exist already: the last record of a run, or a file of prompts and responses from any engine."""

from pathlib import Path
from typing import Any

from tokencredit.audit.sample import rollout_of
from tokencredit.audit.settings import AuditSettings
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.store import RecordStore
from tokencredit.collect.prompts import prompt_ids
from tokencredit.collect.rollout import Rollout
from tokencredit.errors import TokenCreditError
from tokencredit.files import parse_json, read_text

# What engines call the same thing; the first that a row has is taken.
PROMPT = ("prompt", "prompts", "input", "inputs", "question")
RESPONSE = ("response", "completion", "output", "outputs", "text", "generation")
REWARD = ("reward", "score", "rewards")


def read_run(folder: Path) -> tuple[TokenBatch, list[list[str]], list[str], dict[str, str]]:
    """The last record of a run: batch, texts of tokens, prompts, and facts for the page."""
    store = RecordStore(folder / "records")
    if not len(store):
        raise TokenCreditError(f"{folder} has no records", hint="train with `records: {every: 1}`")
    record = store.read(-1)
    prompts = record.prompts or [f"(group {group})" for group in record.batch.group_ids.tolist()]
    return record.batch, record.tokens, prompts, {"run": str(folder), "step": str(record.step)}


def read_responses(path: Path, model: Any, tokenizer: Any, settings: AuditSettings) -> Rollout:
    """Rows of a JSONL with a prompt, a response and a reward; other columns go to the teacher.

    A prompt is a text or messages; a response is a text, or token ids under `response_ids`, which are exact. Texts are
    encoded again, and get the tokenizer's end token unless `finish_reason` says that they were cut off. Names of vLLM's
    outputs, verl's rollout dumps (`input`, `output`, `score`) and TRL's (`completion`) are understood.

    Raises:
      TokenCreditError: names the file, the line and what is missing.
    """
    prompts, responses, rewards, columns = [], [], [], []
    for number, line in enumerate(read_text(path, "file of responses").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise TokenCreditError(f"{where} is not an object", hint='write {"prompt": …, "response": …, "reward": …}')
        prompts.append(row.get("prompt_ids") or prompt_ids(tokenizer, _first(row, PROMPT, where)))
        responses.append(_response_ids(row, tokenizer, where))
        rewards.append(_reward(row, where))
        columns.append({**row, "prompt": row.get("prompt", "")})
    if not prompts:
        raise TokenCreditError(f"{path} has no responses")
    return rollout_of(model, tokenizer, prompts, responses, rewards, columns, settings)


def _first(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise TokenCreditError(f"{where} has none of {', '.join(names)}; it has: {', '.join(map(str, row)) or '(nothing)'}")


def _response_ids(row: dict[str, Any], tokenizer: Any, where: str) -> list[int]:
    ids = row.get("response_ids") or row.get("token_ids") or row.get("completion_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(isinstance(item, int) for item in ids):
            raise TokenCreditError(f"{where}: token ids must be a list of whole numbers")
        return ids
    text = _first(row, RESPONSE, where)
    if isinstance(text, list):  # messages, or vLLM's list of outputs
        text = text[0].get("content", text[0].get("text")) if text and isinstance(text[0], dict) else None
    if not isinstance(text, str):
        raise TokenCreditError(f"{where}: the response must be a text or token ids")
    encoded = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = row.get("finish_reason") == "length" or tokenizer.eos_token_id is None
    return encoded if cut else [*encoded, int(tokenizer.eos_token_id)]


def _reward(row: dict[str, Any], where: str) -> float | None:
    value = next((row[name] for name in REWARD if name in row), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TokenCreditError(f"{where}: the reward must be a number or null, got {value!r}")
    return None if value is None else float(value)
