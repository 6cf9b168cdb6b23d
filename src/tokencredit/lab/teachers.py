"""Teachers from the lab: a `teacher:` section may name a model of the lab by size and stage."""

from collections.abc import Mapping
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import SIZES, warm_start
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
    if isinstance(found.get("model"), str) and found["model"] in SIZES and task in TASKS:
        found["model"] = str(warm_start(str(task), size=found["model"], stage=found.pop("stage", "late")))
    return found
