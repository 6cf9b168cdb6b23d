"""Credit records on disk: one safetensors file a record, one line of `records.jsonl` a record. Nothing is pickled."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS, CreditRecord, TokenBatch
from tokencredit.errors import TokenCreditError, shown
from tokencredit.files import make_folder, write_bytes

SCHEMA = 1
INDEX = "records.jsonl"
LOCK = ".records.lock"
PATIENCE = 60.0  # seconds to wait for another process that appends
TENSORS = frozenset({"response_ids", "response_mask", "rewards", "group_ids", "step_ids", *OPTIONAL_FIELDS})
_DIGEST = b', "digest": "'  # the last key of a line, with the hash of all that stands before it


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
    that no line names; both are ignored when reading and overwritten by the next `append`. Several stores, in one
    process or in several, may append to one folder: each waits for the other and goes on after what it wrote. A store
    sees what was there when it was opened, or when it appended last.

    Tensors come back bit for bit, on the CPU and with their dtype; fields that were None are None. JSON turns the
    tuples of a pipeline's configuration into lists. The reducer is not stored: a record holds the rows of its process.
    The line and the tensors carry a SHA-256, which `read` compares; records of earlier versions have none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = self.folder / INDEX
        self._entries: list[Entry] = []
        self._state: tuple[int, ...] = ()
        self._refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CreditRecord]:
        return (self.read(number) for number in range(len(self)))

    @property
    def steps(self) -> list[int]:
        """The step of every record."""
        return [entry.step for entry in self._entries]

    def append(self, record: CreditRecord) -> None:
        """Write one record; it is on disk when this returns.

        Raises:
          TokenCreditError: the record cannot be written as JSON, or the disk is full, or the folder is not writable.
        """
        content = _content(record)
        tensors = {name: _plain(value) for name, value in record.batch.tensors().items() if name in TENSORS}
        packed = save(tensors | {"advantages": _plain(record.advantages)}, metadata={"schema": str(SCHEMA)})
        with self._locked():
            self._refresh()
            name = f"{len(self):06d}-step-{record.step}.safetensors"
            line = _line({"schema": SCHEMA, "step": record.step, "file": name, "sha256": _hash(packed)} | content)
            write_bytes(self.folder / name, packed)
            start = self._entries[-1].end if self._entries else 0
            with _writing(self.index), self.index.open("r+b" if self.index.exists() else "wb") as file:
                file.truncate(start)  # a torn line of a killed run
                file.seek(start)
                file.write(line)
                _flush(file)
            self._entries.append(Entry(start, start + len(line), record.step, name))
            self._state = _state_of(self.index)

    def read(self, number: int) -> CreditRecord:
        """The record of 0-based `number`; negative numbers count from the end.

        Raises:
          TokenCreditError: there is no such record, or a byte of it differs from what was written; names the file.
        """
        if not -len(self) <= number < len(self):
            raise TokenCreditError(f"{self.index} has {len(self)} records, asked for record {number}")
        entry = self._entries[number]
        where = f"{self.index}, record {number % len(self)} (step {entry.step})"
        with _reading(self.index), self.index.open("rb") as file:
            file.seek(entry.start)
            line = file.read(entry.end - entry.start)
        content = _checked_line(line, where)
        tensors = _load(self.folder / entry.file, content.get("sha256"))
        return _record(entry.step, content, tensors, f"{where}, {entry.file}")

    def truncate(self, step: int) -> None:
        """Drop every record of `step` or later, for a run that resumes there."""
        if not any(entry.step >= step for entry in self._entries):
            return
        with self._locked():
            self._refresh()
            kept = [entry for entry in self._entries if entry.step < step]
            dropped = [entry for entry in self._entries if entry.step >= step]
            with _reading(self.index):
                content = self.index.read_bytes()
            write_bytes(self.index, b"".join(content[entry.start : entry.end] for entry in kept))
            self._refresh()
            for entry in dropped:
                with _writing(self.folder / entry.file):
                    (self.folder / entry.file).unlink(missing_ok=True)

    def _refresh(self) -> None:
        """Read the index again if anything but this store has written to it."""
        state = _state_of(self.index)
        if state != self._state:
            self._entries = _read_entries(self.index)
            self._state = state

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder for one change; a process that dies gives it back."""
        make_folder(self.folder)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise TokenCreditError(
                f"another process has been writing to {self.folder} for {PATIENCE:g} seconds",
                hint="end it, or write the records to another folder",
            ) from error
        except (OSError, NotImplementedError) as error:
            raise TokenCreditError(f"cannot lock {str(self.folder)!r}: {error}") from error
        try:
            for stale in self.folder.glob(".*.safetensors.*.tmp"):  # of a process that was killed while it wrote
                with contextlib.suppress(OSError):
                    stale.unlink()
            yield
        finally:
            lock.release()


def _content(record: CreditRecord) -> dict[str, Any]:
    batch = record.batch
    content = {
        "pipeline": record.pipeline,
        "progress": None if batch.progress is None else float(batch.progress),
        "group_ids": batch.group_ids.tolist(),
        "prompts": record.prompts,
        "tokens": record.tokens,
    }
    # Readers of earlier versions know neither: beside the tensors they are skipped, among them refused.
    if batch.step is not None:
        content["optimizer_step"] = int(batch.step)
    if batch.scored is not None:
        content["scored"] = batch.scored.tolist()
    try:
        json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenCreditError(
            f"the record of step {record.step} is no JSON: {error}",
            hint="`pipeline` is what `Pipeline.to_config()` returns, `tokens` and `prompts` are strings",
        ) from error
    return content


def _line(content: Mapping[str, Any]) -> bytes:
    body = json.dumps(content).encode("ascii")[:-1]
    return body + _DIGEST + _hash(body).encode("ascii") + b'"}\n'


def _checked_line(line: bytes, where: str) -> Mapping[str, Any]:
    """The content of an index line whose hash, if it has one, is that of its bytes."""
    body, found, digest = line.rpartition(_DIGEST)
    if found and digest != _hash(body).encode("ascii") + b'"}\n':
        raise _damaged(where)
    content = _object(line)
    if content is None or ("digest" in content and not found):
        raise _damaged(where)
    return content


def _damaged(where: str) -> TokenCreditError:
    return TokenCreditError(
        f"{where}: the bytes are not those that were written",
        hint=f"copy the folder again, or delete its line in {INDEX}",
    )


def _record(step: int, content: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> CreditRecord:
    """Build the record; the two gates and the types of the line are checked again, because a file is only data."""
    advantages = tensors.pop("advantages", None)
    unknown = sorted(tensors.keys() - TENSORS)
    missing = sorted({"response_ids", "response_mask", "rewards", "group_ids"} - tensors.keys())
    if advantages is None or missing:
        raise TokenCreditError(
            f"{where}: there is no tensor {(['advantages'] if advantages is None else missing)[0]!r}"
        )
    if unknown:
        raise TokenCreditError(
            f"{where}: this version knows no tensor {shown(unknown[0])}",
            hint="read the run with the version of tokencredit that wrote it (`versions` in its run.json)",
        )
    tokens, prompts = content.get("tokens", []), content.get("prompts", [])
    if not (_are_texts(prompts) and isinstance(tokens, list) and all(_are_texts(row) for row in tokens)):
        raise TokenCreditError(f"{where}: `tokens` and `prompts` must be lists of texts")
    scored = content.get("scored")
    if scored is not None and not (isinstance(scored, list) and all(isinstance(item, bool) for item in scored)):
        raise TokenCreditError(f"{where}: `scored` must be a list of true and false")
    try:
        batch = TokenBatch(
            **tensors,  # type: ignore[arg-type]
            scored=None if scored is None else torch.tensor(scored, dtype=torch.bool),
            progress=content.get("progress"),
            step=content.get("optimizer_step"),
        )
    except TokenCreditError as error:
        raise TokenCreditError(f"{where}: {error.message}") from error
    if advantages.shape != batch.response_mask.shape:
        raise TokenCreditError(f"{where}: `advantages` are {list(advantages.shape)}, the batch is {batch!r}")
    return CreditRecord(
        step=step,
        pipeline=content.get("pipeline"),
        batch=batch,
        advantages=advantages,
        tokens=tokens,
        prompts=prompts,
    )


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _read_entries(index: Path) -> list[Entry]:
    """The whole lines of the index; a last line without a newline is one that was torn, and is left out."""
    if not index.exists():
        return []
    found: list[Entry] = []
    with _reading(index):
        lines = index.read_bytes().splitlines(keepends=True)
    start = 0
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        content = _object(line)
        if content is None:
            raise TokenCreditError(f"{index}, line {number}: no JSON object", hint="delete the line, keep the others")
        found.append(_entry(content, index, number, start, start + len(line)))
        start += len(line)
    return found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _entry(content: Mapping[str, Any], index: Path, number: int, start: int, end: int) -> Entry:
    if content.get("schema") != SCHEMA:
        raise TokenCreditError(
            f"{index}, line {number}: records of schema {shown(content.get('schema'))}, this version reads {SCHEMA}",
            hint="read the run with the version of tokencredit that wrote it (`versions` in its run.json)",
        )
    file, step = content.get("file"), content.get("step")
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:  # it never points outside its folder
        raise TokenCreditError(f"{index}, line {number}: `file` must be a plain file name, got {shown(file)}")
    if not isinstance(step, int) or isinstance(step, bool):
        raise TokenCreditError(f"{index}, line {number}: `step` must be a whole number, got {shown(step)}")
    return Entry(start, end, step, file)


def _plain(value: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory, such as expanded ones.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _load(path: Path, expected: object) -> dict[str, Tensor]:
    if not path.exists():
        raise TokenCreditError(
            f"{path} is missing, though {INDEX} names it", hint="copy the whole folder, or delete its line there"
        )
    with _reading(path):
        packed = path.read_bytes()
    if expected is not None and _hash(packed) != expected:
        raise _damaged(str(path))
    try:
        return load(packed)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that it does not know
        raise TokenCreditError(
            f"{path} is no safetensors file: {error}", hint=f"copy it again, or delete its line in {INDEX}"
        ) from error


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()


def _state_of(index: Path) -> tuple[int, ...]:
    """What changes whenever another store writes to the index."""
    try:
        found = index.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TokenCreditError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TokenCreditError(
            f"cannot write {str(path)!r}: {error.strerror or error}", hint="the records before it are whole"
        ) from error


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
