"""Files of JSON lines: written whole, appended durably, read back without what a kill tore off."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import whole_file


def json_line(value: object) -> bytes:
    """One line of JSON in UTF-8; text with a lone surrogate, which UTF-8 lacks, is written with escapes."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii") + b"\n"


def write_lines(path: Path, values: Iterable[object]) -> None:
    """Write JSON lines one after another, so that a large file never exists in memory; whole or absent."""
    with whole_file(path) as file:
        file.writelines(map(json_line, values))


def append(path: Path, lines: bytes) -> None:
    """Add lines to a log; they are on disk before this returns, and a kill leaves at most a torn tail.

    A torn tail that an earlier kill left is cut off first.
    """
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TokenCreditError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Read a log; a torn last line, which a kill left, is left out, any other bad line is an error.

    Reading changes nothing: a report may read while a search writes.
    """
    if not path.is_file():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenCreditError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenCreditError(f"{path}:{number}: not a JSON line", hint="the log was changed by hand") from error
        if not isinstance(record, dict):
            raise TokenCreditError(f"{path}:{number}: not a JSON object", hint="the log was changed by hand")
        yield record
