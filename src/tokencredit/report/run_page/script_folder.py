"""A folder that a training script of one's own wrote: TRL's `output_dir`, credit records, or both."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.batch.store import INDEX, RecordStore
from tokencredit.errors import TokenCreditError
from tokencredit.files import read_json
from tokencredit.methods.table import presets
from tokencredit.pipeline.labels import label_of
from tokencredit.report.run_page.lines import Line, read_history

STATE = "trainer_state.json"


def find_records(folder: Path) -> Path | None:
    """The folder of credit records: this one, its `records`, or the only other sub-folder that holds some."""
    for candidate in (folder, folder / "records"):
        if (candidate / INDEX).is_file():
            return candidate
    others = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    return others[0] if len(others) == 1 else None


def find_state(folder: Path) -> Path | None:
    """The newest `trainer_state.json`: of the folder itself, or of its last checkpoint."""
    if (folder / STATE).is_file():
        return folder / STATE
    return max(folder.glob(f"checkpoint-*/{STATE}"), key=_checkpoint_number, default=None)


def read_state(path: Path | None) -> list[Line]:
    """The lines of a trainer's log history, where there is one."""
    if path is None:
        return []
    content = read_json(path, "trainer state")
    if not isinstance(content, Mapping):
        raise TokenCreditError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return read_history(content, path)


def pipeline_of(records: RecordStore) -> Any:
    """The pipeline of the first record; None without records."""
    return records.read(0).pipeline if len(records) else None


def name_of(pipeline: Any) -> str | None:
    """The preset that a stored pipeline is, or its steps; None where it cannot be read."""
    from tokencredit.pipeline.pipeline import Pipeline

    if pipeline is None:
        return None
    try:
        label = label_of(pipeline)
    except TokenCreditError:
        return None
    return next((name for name in presets() if label_of(Pipeline.parse(name).to_config()) == label), label)


def _checkpoint_number(path: Path) -> int:
    digits = re.fullmatch(r"checkpoint-([0-9]{1,18})", path.parent.name)
    return int(digits.group(1)) if digits else -1
