"""Folders that are expensive to build: built once, complete or absent, checked before use."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

CARD = "tokencredit.json"

_log = logging.getLogger(__name__)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `$TOKENCREDIT_CACHE`, else `~/.cache/tokencredit`."""
    return Path(cache_dir or os.environ.get("TOKENCREDIT_CACHE") or Path.home() / ".cache" / "tokencredit").expanduser()


def fingerprint(settings: dict[str, Any]) -> str:
    """A short hash of JSON settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def cached_folder(folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Path:
    """`folder`, built by `build(path)` unless it is there and intact.

    `build` writes its files and returns what else belongs on the card. The folder appears by one rename, with the card
    that holds the settings and the hash of every file, so a kill leaves nothing half-written under its name. A folder
    that does not match its card is built again. A lock keeps two processes from building the same folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            damage = find_damage(folder, settings)
            if damage is None:
                return folder
            _log.warning("%s: %s; building it again", folder, damage)
            shutil.rmtree(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed build left
        partial.mkdir()
        card = {"settings": settings, **build(partial)}
        card["files"] = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        (partial / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
        partial.rename(folder)
    return folder


def find_damage(folder: Path, settings: dict[str, Any]) -> str | None:
    """What is wrong with a cached folder, or None."""
    try:
        card = json.loads((folder / CARD).read_text())
        files = dict(card["files"])
        recorded = card["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its card {CARD} is missing or unreadable"
    if recorded != json.loads(json.dumps(settings)):
        return f"its card {CARD} records other settings"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{name} is missing or damaged"
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
