"""Reading raw data (JSON, Parquet, a Hugging Face dataset folder) into a canonical pool."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_text
from tokencredit.progress import printable, track
from tokencredit.recipes.pool.formats import Refusal, meaning_of, text_of, to_sample
from tokencredit.recipes.pool.readers import expand, records
from tokencredit.recipes.pool.samples import INDEX, POOL, Pool, make_pool, name_of, save_index
from tokencredit.recipes.pool.words import count_words

REJECTED = "rejected.jsonl"
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+(?=\n|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that became no sample, by file and line from 1."""

    file: str
    line: int
    reason: str


def normalise(text: str) -> str:
    """NFC, one kind of line end, no spaces at the end of lines, no newlines at the end."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return _TRAILING.sub("", text).rstrip("\n")


def text_hash(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> int:
    """First 64 bits of SHA-256 over compact JSON `[[role, text], …]` of the normalised text.

    A message with thinking, tool calls or weight 0 is `[role, text, {…}]`, and tools come last. Source and metadata are
    not part of the hash: the same text from two sources is the same sample, repeated.
    """
    parts: list[list[Any]] = []
    for message in messages:
        meaning = meaning_of(message)
        parts.append([message["role"], normalise(message["content"]), *([meaning] if meaning else [])])
    if tools:
        parts.append(["tools", list(tools)])
    compact = json.dumps(parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=str)
    # A lone surrogate is legal JSON and not legal UTF-8.
    return int.from_bytes(hashlib.sha256(compact.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(slots=True, kw_only=True)
class _Columns:
    """What the index will hold, filled sample by sample."""

    hashes: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    repeats: dict[int, int] = field(default_factory=dict)

    def add(self, sample: Mapping[str, Any], offset: int) -> bytes:
        """The line of a sample in `pool.jsonl`; its columns are kept."""
        digest = text_hash(sample["messages"], sample.get("tools", ()))
        repeat = self.repeats.get(digest, -1) + 1
        line = json.dumps({"id": name_of(digest, repeat), **sample}, default=_as_text).encode() + b"\n"
        self.repeats[digest] = repeat
        self.hashes.append(digest)
        self.sources.append(sample["source"])
        self.words.append(sum(count_words(text_of(message)) for message in sample["messages"]))
        self.offsets.append(offset)
        return line


def _as_text(value: Any) -> str:
    """Dates and numbers that JSON lacks, from Parquet, as text; bytes by their length."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def canonicalise(inputs: list[Path], out: Path, *, skip_bad: bool = False) -> tuple[Pool, list[Rejected]]:
    """Write `pool.jsonl` with its index, and `rejected.jsonl`; the original text is kept for training.

    A record without an assistant turn, with an empty response, with something that a pool cannot hold, or a malformed
    line is refused with file and line, or, with `skip_bad`, counted and listed. A pool that was in `out` before stays
    until the new one is complete.
    """
    files = expand(inputs)
    make_folder(out)
    partial = out / (POOL + ".partial")
    columns = _Columns()
    try:
        with partial.open("wb") as file:
            rejected = _read_all(files, columns, file)
            file.flush()
        _check_rejected(rejected, inputs, columns, out, skip_bad)
        pool = make_pool(columns.hashes, columns.sources, columns.words, columns.offsets, out)
        (out / INDEX).unlink(missing_ok=True)  # an index never describes another text
        partial.replace(out / POOL)
        save_index(pool, out)
    except OSError as error:
        raise TokenCreditError(f"cannot write the pool in {out}: {error.strerror or error}") from error
    finally:
        if partial.is_file():
            partial.unlink()
    return pool, rejected


def _read_all(files: Iterable[Path], columns: _Columns, file: Any) -> list[Rejected]:
    rejected = []
    for path in files:
        for line, record in track(records(path), f"reading {printable(path.name)}"):
            try:
                written = columns.add(to_sample(record, default_source=path.stem), file.tell())
            except Refusal as refusal:
                rejected.append(Rejected(file=str(path), line=line, reason=str(refusal)))
                continue
            file.write(written)
    return rejected


def _check_rejected(rejected: list[Rejected], inputs: list[Path], columns: _Columns, out: Path, skip_bad: bool) -> None:
    lines = [json.dumps({"file": item.file, "line": item.line, "reason": item.reason}) + "\n" for item in rejected]
    write_text(out / REJECTED, "".join(lines))
    if rejected and not skip_bad:
        first = rejected[0]
        raise TokenCreditError(
            f"{printable(first.file)}:{first.line}: {printable(first.reason)} "
            f"({len(rejected)} bad lines in all, listed in {out / REJECTED})",
            hint="mend the lines, or pass --skip-bad to leave them out and count them",
        )
    if not columns.hashes:
        raise TokenCreditError(f"no usable sample in {', '.join(map(str, inputs))}", hint=f"see {out / REJECTED}")
