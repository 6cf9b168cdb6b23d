"""A `teacher:` section that names a model of the lab."""

from pathlib import Path

import pytest

from tokencredit.lab import teachers
from tokencredit.lab.teachers import with_lab_model


def test_a_size_and_a_stage_become_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "warm_start", lambda task, *, size, stage: Path(f"{task}-{size}-{stage}"))
    given = {"kind": "model", "model": "tiny", "batch_size": 4}
    assert with_lab_model(given, "countdown") == {"kind": "model", "model": "countdown-tiny-late", "batch_size": 4}
    assert with_lab_model({**given, "stage": "middle"}, "carry")["model"] == "carry-tiny-middle"
    assert given == {"kind": "model", "model": "tiny", "batch_size": 4}


@pytest.mark.parametrize("task", [None, "my_tasks:sorting"])
def test_elsewhere_a_section_stays_as_it_is(task: str | None) -> None:
    given = {"kind": "model", "model": "tiny", "stage": "late"}
    assert with_lab_model(given, task) == given
    assert with_lab_model({"kind": "self", "template": "trace"}, "countdown") == {"kind": "self", "template": "trace"}
