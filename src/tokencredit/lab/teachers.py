"""Teachers from the lab: a `teacher:` section may name a model of the lab by size and stage."""

from collections.abc import Mapping
from typing import Any

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.lab.model import SIZES, STAGES, warm_start
from tokencredit.lab.tasks import TASKS


def with_lab_model(section: Any, task: str | None) -> dict[str, Any]:
    """The section with `model: tiny` or `small` and a `stage` ("late" if none) turned into the folder of that model.

    Only on a task of the lab; it is built on first use. Other sections come back as they are.
    """
    if not isinstance(section, Mapping):
        raise TokenCreditError(
            f"`teacher` must be a mapping with `kind`, got {section!r}", hint="for example `teacher: {kind: base}`"
        )
    found = dict(section)
    size = found.get("model")
    if isinstance(size, str) and size in SIZES and task in TASKS:
        stage = found.pop("stage", "late")
        if not isinstance(stage, str) or stage not in STAGES:
            raise unknown("stage of the teacher", stage, STAGES)
        found["model"] = str(warm_start(str(task), size=size, stage=stage))
    return found
