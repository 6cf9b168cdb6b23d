"""Reading raw data (JSONL, Parquet, a Hugging Face dataset folder) into a canonical pool."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.progress import track
from tokencredit.recipes.pool import POOL, Pool, make_pool, name_of, save_index

REJECTED = "rejected.jsonl"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+(?=\n|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that became no sample, by file and line from 1."""

    file: str
    line: int
    reason: str


class _Refusal(Exception):
    """One record cannot become a sample; the text is the reason."""


def normalise(text: str) -> str:
    """NFC, one kind of line end, no spaces at the end of lines, no newlines at the end."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return _TRAILING.sub("", text).rstrip("\n")


def text_hash(messages: list[dict[str, str]]) -> int:
    """First 64 bits of SHA-256 over compact JSON `[[role, text], …]` of the normalised text.

    Source and metadata are not part of it: the same text from two sources is the same sample, repeated.
    """
    pairs = [[message["role"], normalise(message["content"])] for message in messages]
    compact = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate is legal JSON and not legal UTF-8.
    return int.from_bytes(hashlib.sha256(compact.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def canonicalise(inputs: list[Path], out: Path, *, skip_bad: bool = False) -> tuple[Pool, list[Rejected]]:
    """Write `pool.jsonl` with its index, and `rejected.jsonl`; the original text is kept for training.

    A record without an assistant turn, with an empty response or a malformed line is refused with file and line, or,
    with `skip_bad`, counted and listed.
    """
    out.mkdir(parents=True, exist_ok=True)
    rejected: list[Rejected] = []
    hashes, sources, words, offsets = [], [], [], []
    repeats: dict[int, int] = {}
    partial = out / (POOL + ".partial")
    with partial.open("wb") as file:
        for path in expand(inputs):
            for line, record in track(_records(path), f"reading {path.name}"):
                try:
                    sample = to_sample(record, default_source=path.stem)
                except _Refusal as refusal:
                    rejected.append(Rejected(file=str(path), line=line, reason=str(refusal)))
                    continue
                digest = text_hash(sample["messages"])
                hashes.append(digest)
                sources.append(sample["source"])
                words.append(sum(len(message["content"].split()) for message in sample["messages"]))
                offsets.append(file.tell())
                repeat = repeats[digest] = repeats.get(digest, -1) + 1
                file.write(json.dumps({"id": name_of(digest, repeat), **sample}).encode() + b"\n")
    _write_rejected(rejected, out)
    if rejected and not skip_bad:
        partial.unlink()
        first = rejected[0]
        raise TokenCreditError(
            f"{first.file}:{first.line}: {first.reason} ({len(rejected)} bad lines in all, listed in {out / REJECTED})",
            hint="mend the lines, or pass --skip-bad to leave them out and count them",
        )
    if not hashes:
        raise TokenCreditError(f"no usable sample in {', '.join(map(str, inputs))}", hint=f"see {out / REJECTED}")
    partial.replace(out / POOL)
    pool = make_pool(hashes, sources, words, offsets, out)
    save_index(pool, out)
    return pool, rejected


def _write_rejected(rejected: list[Rejected], out: Path) -> None:
    with (out / REJECTED).open("w", encoding="utf-8") as file:
        for item in rejected:
            file.write(json.dumps({"file": item.file, "line": item.line, "reason": item.reason}) + "\n")


def expand(inputs: list[Path]) -> list[Path]:
    """The data files behind files and folders, folders sorted by name."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files.extend(_folder_files(path))
        elif path.is_file():
            files.append(path)
        else:
            raise TokenCreditError(f"{path} does not exist", hint="give JSONL or Parquet files, or a dataset folder")
    return files


def _folder_files(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise TokenCreditError(
            f"{path} holds several splits: {', '.join(splits)}", hint=f"name one: {path}/{splits[0]}"
        )
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        return [path / entry["filename"] for entry in state["_data_files"]]
    files = sorted(file for suffix in ("jsonl", "parquet", "arrow") for file in path.glob(f"*.{suffix}"))
    if not files:
        raise TokenCreditError(f"{path} holds no JSONL, Parquet or Arrow file")
    return files


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number from 1, record); an unreadable line yields the `_Refusal` in its place."""
    if path.suffix in {".jsonl", ".json", ".ndjson"}:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield number, _parse(raw)
    elif path.suffix in {".parquet", ".arrow"}:
        number = 0
        for batch in _batches(path):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    else:
        raise TokenCreditError(f"{path} is neither JSONL, Parquet nor Arrow, by its suffix {path.suffix!r}")


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return _Refusal(f"not a JSON object: {error}")


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(path).iter_batches(4096)
        return
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source)
    except pa.ArrowInvalid:  # the file format, with a footer, rather than the stream that `datasets` writes
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def to_sample(record: Any, default_source: str) -> dict[str, Any]:
    """`{source, messages, meta}` from messages, ShareGPT conversations, Alpaca fields or a prompt–response pair."""
    if isinstance(record, _Refusal):
        raise record
    if not isinstance(record, dict):
        raise _Refusal(f"expected an object, got {type(record).__name__}")
    messages, used = _messages_of(record)
    assistant = [message for message in messages if message["role"] == "assistant"]
    if not assistant:
        raise _Refusal("no assistant turn")
    if not all(message["content"].strip() for message in assistant):
        raise _Refusal("empty response")
    source = record.get("source") or record.get("dataset") or default_source
    meta = record.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    rest = {key: value for key, value in record.items() if key not in used | {"source", "dataset", "meta"}}
    scalars = {key: value for key, value in rest.items() if isinstance(value, str | int | float | bool)}
    return {"source": str(source), "messages": messages, "meta": {**scalars, **meta}}


def _messages_of(record: dict[str, Any]) -> tuple[list[dict[str, str]], set[str]]:
    for key in ("messages", "conversations"):
        if isinstance(record.get(key), list):
            return [_message(turn) for turn in record[key]], {key}
    for prompt, response in PAIRS:
        if prompt in record and response in record:
            extra = _text(record.get("input") or "") if prompt == "instruction" else ""
            question = _text(record[prompt]) + (f"\n\n{extra}" if extra else "")
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record[response])}]
            if record.get("system"):
                turns.insert(0, {"role": "system", "content": _text(record["system"])})
            return turns, {prompt, response, "input", "system"}
    raise _Refusal(f"no messages and no prompt–response pair among the fields {', '.join(sorted(record)) or '(none)'}")


def _message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _Refusal(f"a message must be an object, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise _Refusal(f"unknown role {role!r}; known: {', '.join(sorted(ROLES))}")
    return {"role": ROLES[role], "content": _text(turn.get("content", turn.get("value")))}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise _Refusal(f"expected text, got {type(content).__name__}")
