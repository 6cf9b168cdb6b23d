"""Read and write files: YAML and JSON with one-line errors, writes that are whole or absent, locks of folders.

Every reader raises `TokenCreditError` with the file's name, whatever the file holds: bytes that are not UTF-8, text
that is not YAML or JSON, nesting too deep to parse, numbers with thousands of digits.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from filelock import FileLock, Timeout

from tokencredit.errors import TokenCreditError

LOCK, OWNER = ".lock", ".lock.owner"

# Numbers as YAML 1.2 spells them. PyYAML follows YAML 1.1, where `1e-6` is text and `1:30` is the number 90.
_NUMBERS = {
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}  # a date stays text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text such as "1e-6" is quoted."""


def _use_numbers_of_yaml_1_2(kind: Any) -> None:
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in kind.yaml_implicit_resolvers.items()
    }
    kind.yaml_implicit_resolvers = kept
    for tag, (pattern, first) in _NUMBERS.items():
        kind.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first))


def _construct_int(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    digits = text.lstrip("+-")
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(text, base)


for _kind in (_Loader, _Dumper):
    _use_numbers_of_yaml_1_2(_kind)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_text(path: Path, what: str = "file") -> str:
    """Read a UTF-8 text file.

    Raises:
      TokenCreditError: the file is missing, is a folder, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenCreditError(f"no {what} {str(path)!r}") from error
    except UnicodeDecodeError as error:
        raise TokenCreditError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise TokenCreditError(f"cannot read the {what} {str(path)!r}: {error.strerror or error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text with the numbers of YAML 1.2 (`1e-6` is a number).

    Args:
      text: the YAML document.
      source: where the text comes from, for the error message.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise TokenCreditError(f"{source} is nested too deeply to be read as YAML") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise TokenCreditError(f"{source} is not valid YAML: {_one_line(error)}") from error


def read_yaml(path: Path, what: str = "file") -> Any:
    """Read a YAML file; see `read_text` and `parse_yaml` for the errors."""
    return parse_yaml(read_text(path, what), str(path))


def dump_yaml(value: Any) -> str:
    """Write a value as YAML text that `parse_yaml` reads back unchanged; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(text: str, source: str) -> Any:
    """Parse JSON text; `source` names it in the error message."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise TokenCreditError(f"{source} is nested too deeply to be read as JSON") from error
    except ValueError as error:  # also a number of more digits than Python converts
        raise TokenCreditError(f"{source} is not valid JSON: {_one_line(error)}") from error


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON file; see `read_text` and `parse_json` for the errors."""
    return parse_json(read_text(path, what), str(path))


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent, also after a power cut."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, also after a power cut; see `whole_file` for the errors."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears when the block ends, whole, or not at all.

    The content goes to a temporary file in the same folder, which is flushed to the disk and then renamed.

    Raises:
      TokenCreditError: the disk is full, the folder is read-only, or the path is not a writable file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise TokenCreditError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with sorted keys, whole or absent."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """Write a YAML file with keys in order, whole or absent."""
    write_text(path, dump_yaml(value))


def make_folder(path: Path) -> Path:
    """Create a folder with its parents; an error in one line where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenCreditError(
            f"cannot create the folder {str(path)!r}: {error.strerror or error}", hint="choose another folder"
        ) from error
    return path


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, so that two commands never write into one folder.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
      TokenCreditError: another process holds the folder; the error names its process id.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = folder / OWNER
        pid = owner.read_text(errors="replace").strip() if owner.is_file() else "unknown"
        raise TokenCreditError(
            f"{folder} is in use by another process (pid {pid})",
            hint="wait for it, or choose another folder with --out",
        ) from error
    except OSError as error:
        raise TokenCreditError(f"cannot lock {str(folder)!r}: {error.strerror or error}") from error
    try:
        write_text(folder / OWNER, f"{os.getpid()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / OWNER).unlink()
        lock.release()  # the lock file stays: removing it would let two processes lock two files of one name


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
