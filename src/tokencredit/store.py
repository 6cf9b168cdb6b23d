"""Credit records on disk: one safetensors file a record, one line of `records.jsonl` a record. Nothing is pickled."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.records import CreditRecord, TokenBatch

SCHEMA = 1
INDEX = "records.jsonl"


class Entry(NamedTuple):
    """Where a record lies: the byte range of its index line, its step and its file."""

    start: int
    end: int
    step: int
    file: str


class RecordStore:
    """The records of one run, in the order they were appended.

    A record is its tensors (`<number>-step-<step>.safetensors`, written to a temporary name and renamed) and then its
    index line, so whatever the index names is whole. A process that is killed leaves at most a torn last line or a file
    that no line names; both are ignored when reading and overwritten by the next `append`. One process writes; any
    number may read meanwhile, each sees what was there when it opened the store.

    Tensors come back bit for bit, on the CPU and with their dtype; fields that were None are None. JSON turns the
    tuples of a pipeline's configuration into lists. The reducer is not stored: a record holds the rows of its process.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = self.folder / INDEX
        self._entries = _read_entries(self.index)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CreditRecord]:
        return (self.read(number) for number in range(len(self)))

    @property
    def steps(self) -> list[int]:
        """The step of every record."""
        return [entry.step for entry in self._entries]

    def append(self, record: CreditRecord) -> None:
        """Write one record; it is on disk when this returns."""
        name = f"{len(self):06d}-step-{record.step}.safetensors"
        line = _encode(record, name)
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: _plain(value) for name, value in record.batch.tensors().items()}
        _save(tensors | {"advantages": _plain(record.advantages)}, self.folder / name)
        start = self._entries[-1].end if self._entries else 0
        with self.index.open("r+b" if self.index.exists() else "wb") as file:
            file.truncate(start)  # a torn line of a killed run
            file.seek(start)
            file.write(line)
            _flush(file)
        self._entries.append(Entry(start, start + len(line), record.step, name))

    def read(self, number: int) -> CreditRecord:
        """The record of 0-based `number`; negative numbers count from the end."""
        if not -len(self) <= number < len(self):
            raise TokenCreditError(f"{self.index} has {len(self)} records, asked for record {number}")
        entry = self._entries[number]
        with self.index.open("rb") as file:
            file.seek(entry.start)
            line = json.loads(file.read(entry.end - entry.start))
        tensors = _load(self.folder / entry.file)
        advantages = tensors.pop("advantages")
        return CreditRecord(
            step=entry.step,
            pipeline=line["pipeline"],
            batch=TokenBatch(**tensors, progress=line["progress"], step=line.get("batch_step")),  # type: ignore[arg-type]
            advantages=advantages,
            tokens=line["tokens"],
            prompts=line["prompts"],
        )

    def truncate(self, step: int) -> None:
        """Drop every record of `step` or later, for a run that resumes there."""
        kept = [entry for entry in self._entries if entry.step < step]
        dropped = [entry for entry in self._entries if entry.step >= step]
        if not dropped:
            return
        content = self.index.read_bytes()
        temporary = self.index.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(b"".join(content[entry.start : entry.end] for entry in kept))
            _flush(file)
        temporary.replace(self.index)
        self._entries = _read_entries(self.index)
        for entry in dropped:
            (self.folder / entry.file).unlink(missing_ok=True)


def _encode(record: CreditRecord, file: str) -> bytes:
    content = {
        "schema": SCHEMA,
        "step": record.step,
        "file": file,
        "pipeline": record.pipeline,
        "progress": record.batch.progress,
        "batch_step": record.batch.step,  # absent in records of earlier versions
        "group_ids": record.batch.group_ids.tolist(),
        "prompts": record.prompts,
        "tokens": record.tokens,
    }
    try:
        return json.dumps(content).encode("ascii") + b"\n"
    except TypeError as error:
        raise TokenCreditError(
            f"the record of step {record.step} is no JSON: {error}",
            hint="`pipeline` is what `Pipeline.to_config()` returns, `tokens` and `prompts` are strings",
        ) from error


def _read_entries(index: Path) -> list[Entry]:
    """The whole lines of the index; a last line that is torn is left out."""
    if not index.exists():
        return []
    found: list[Entry] = []
    lines = index.read_bytes().splitlines(keepends=True)
    start = 0
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            if number == len(lines):
                break
            raise TokenCreditError(f"{index}, line {number}: no JSON object", hint="delete the line, keep the others")
        found.append(_entry(content, index, number, start, start + len(line)))
        start += len(line)
    return found


def _entry(content: Mapping[str, Any], index: Path, number: int, start: int, end: int) -> Entry:
    if content.get("schema") != SCHEMA:
        raise TokenCreditError(
            f"{index}, line {number}: records of schema {content.get('schema')!r}, this version reads {SCHEMA}",
            hint="read the run with the version of tokencredit that wrote it (`versions` in its run.json)",
        )
    file = str(content["file"])
    if Path(file).name != file:  # an index is data: it never points outside its folder
        raise TokenCreditError(f"{index}, line {number}: `file` must be a plain file name, got {file!r}")
    return Entry(start, end, int(content["step"]), file)


def _plain(value: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory, such as expanded ones.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"schema": str(SCHEMA)})
    with temporary.open("rb+") as file:
        _flush(file)
    temporary.replace(path)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise TokenCreditError(
            f"{path} is missing, though {INDEX} names it", hint="copy the whole folder, or delete its line there"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise TokenCreditError(
            f"{path} is no safetensors file: {error}", hint=f"copy it again, or delete its line in {INDEX}"
        ) from error


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
