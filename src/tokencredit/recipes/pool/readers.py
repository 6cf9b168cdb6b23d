"""Records of a data file, one at a time: JSON lines, a JSON array, JSON values one after another, Parquet, Arrow."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import read_json
from tokencredit.recipes.pool.formats import Refusal

JSON = frozenset({".jsonl", ".json", ".ndjson"})
TABLES = frozenset({".parquet", ".arrow"})
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"\s*")


def expand(inputs: list[Path]) -> list[Path]:
    """The data files behind files and folders, folders sorted by name."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files.extend(_folder_files(path))
        elif path.is_file():
            files.append(path)
        else:
            raise TokenCreditError(f"{path} does not exist", hint="give JSON or Parquet files, or a dataset folder")
    return files


def _folder_files(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = _names(path / "dataset_dict.json", lambda facts: [str(name) for name in facts["splits"]])
        raise TokenCreditError(
            f"{path} holds several splits: {', '.join(splits)}", hint=f"name one: {path}/{splits[0]}"
        )
    if (path / "state.json").is_file():
        names = _names(path / "state.json", lambda facts: [entry["filename"] for entry in facts["_data_files"]])
        return [path / name for name in names]
    files = sorted(file for suffix in ("jsonl", "parquet", "arrow") for file in path.glob(f"*.{suffix}"))
    if not files:
        raise TokenCreditError(f"{path} holds no JSONL, Parquet or Arrow file")
    return files


def _names(path: Path, read: Any) -> list[str]:
    try:
        names: list[str] = read(read_json(path))
        if names and all(isinstance(name, str) for name in names):
            return names
    except (KeyError, TypeError, IndexError):
        pass
    raise TokenCreditError(f"{path} is not what `datasets` writes", hint="save the data set again, or give its files")


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number from 1, record); what cannot be read yields a `Refusal` in its place.

    A JSON file is read by what it holds rather than by its suffix: an array, one object on each line, or objects one
    after another. Its number is the line where the record starts, and the place in an array.

    Raises:
      TokenCreditError: the file as a whole cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in JSON | TABLES:
        raise TokenCreditError(f"{path} is neither JSON, Parquet nor Arrow, by its suffix {path.suffix!r}")
    try:
        yield from _json_records(path) if suffix in JSON else _rows(path)
    except OSError as error:  # pyarrow's too
        raise TokenCreditError(f"cannot read {path}: {_brief(error)}") from error


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(_BOM).strip()), b"").removeprefix(_BOM).strip()
    split = isinstance(parse(first), Refusal)
    if split or first.startswith(b"["):
        whole = _whole(path)
        if whole is not None:
            yield from whole
            return
        if split and first.startswith(b"["):
            raise TokenCreditError(f"{path} is a JSON array that cannot be read", hint="it is damaged or cut off")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                yield number, parse(line)


def _whole(path: Path) -> list[tuple[int, Any]] | None:
    """The records of a file that is not one object a line: of an array, or of values after another; else None."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
        decoder, values, place, line = json.JSONDecoder(), [], 0, 1
        while (start := _SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
            line += text.count("\n", place, start)
            value, place = decoder.raw_decode(text, start)
            values.append((line, value))
            line += text.count("\n", start, place)
    except (ValueError, RecursionError):
        return None
    if len(values) == 1 and isinstance(values[0][1], list):
        return list(enumerate(values[0][1], start=1))
    return values


def parse(raw: bytes) -> Any:
    """One JSON value, or the `Refusal` that says why it is none."""
    try:
        return json.loads(raw)
    except RecursionError:
        return Refusal("not a JSON object: nested too deeply")
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        return Refusal(f"not a JSON object: {error}")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pa.ArrowException, ValueError) as error:
        raise TokenCreditError(
            f"cannot read {path}: {_brief(error)}", hint="the file is damaged or cut off; copy it again"
        ) from error


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(path).iter_batches(4096)
        return
    try:
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source)
    except pa.ArrowInvalid:  # the file format, with a footer, rather than the stream that `datasets` writes
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
