"""Damage to run folders, as a full disk, a power cut, a copy by hand or an editor leaves them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

VALUES = [
    *(None, True, 0, -1, 3, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x1b[31m", "$x^{", "\ud800"),
    *([], {}, [[]], [None], [1, "a"], {"a": {"b": None}}, ["../x"], {"grpo": 3}, [{"hapo": None}], ["\x00"]),
]
KINDS = ("flip", "cut", "empty", "zeros", "edit", "drop line", "repeat", "folder", "remove", "text", "surrogate")


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, float, Any]]:
    """A few damages: kind, which file and which place in it as shares of all, and a value to write."""
    one = st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.sampled_from(VALUES))
    return draw(st.lists(one, min_size=1, max_size=3))


def apply(folder: Path, kind: str, which: float, where: float, value: Any) -> None:
    """Damage one file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return
    path = files[min(int(which * len(files)), len(files) - 1)]
    raw = bytearray(path.read_bytes())
    at = min(int(where * len(raw)), max(len(raw) - 1, 0))
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "remove":
        path.unlink()
    elif kind == "edit" and path.suffix in (".json", ".jsonl"):
        path.write_text(_edited(path.read_text(errors="replace"), where, value))
    elif kind == "drop line":
        lines = bytes(raw).splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: int(where * len(lines))] + lines[int(where * len(lines)) + 1 :]))
    else:
        if kind == "flip" and raw:
            raw[at] ^= 1 << int(where * 7)
        contents = {
            "flip": raw,
            "cut": raw[:at],
            "empty": b"",
            "zeros": bytes(len(raw)),
            "repeat": raw + raw[at:],
            "text": b"[" * 3000,
            "surrogate": raw[:at] + b"\xff\xfe" + raw[at:],
        }
        path.write_bytes(bytes(contents.get(kind, raw)))


def _edited(text: str, where: float, value: Any) -> str:
    """The file with one value of one line replaced or added."""
    lines = text.splitlines()
    number = min(int(where * len(lines)), len(lines) - 1)
    try:
        content = json.loads(lines[number]) if len(lines) > 1 else json.loads(text)
    except (ValueError, IndexError, RecursionError):
        return text
    _replace(content, where * 7919 % 1, value)
    written = json.dumps(content)
    return "\n".join([*lines[:number], written, *lines[number + 1 :]]) + "\n" if len(lines) > 1 else written


def _replace(content: Any, where: float, value: Any) -> None:
    keys = (
        list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    )
    if not keys:
        return
    key = keys[min(int(where * len(keys)), len(keys) - 1)]
    inner, rest = content[key], where * len(keys) % 1
    if isinstance(inner, dict | list) and inner and rest < 0.5:
        _replace(inner, rest * 2, value)
    else:
        content[key] = value


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy to damage, hard links where nothing is written in place."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=_link)
    return target


def _link(source: str, target: str) -> None:
    if source.endswith((".json", ".jsonl")):
        shutil.copy2(source, target)
    else:
        os.link(source, target)
