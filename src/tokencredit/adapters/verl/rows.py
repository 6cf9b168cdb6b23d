"""What rows of verl's data store mean for credit; nothing here needs verl."""

import json
from typing import Any

from jaxtyping import Bool
from torch import Tensor

SCHEDULE = "tokencredit_schedule"  # in the meta data of a batch: JSON, share of training done and optimizer steps done


def scored_rows(response_mask: Bool[Tensor, "batch response"]) -> Bool[Tensor, " batch"] | None:
    """False for a row without a chosen token: an empty response, or one that rejection sampling took out.

    Such a row still has a reward in the store, which must move no baseline. None where every row counts.
    """
    filled = response_mask.any(1)
    return None if bool(filled.all()) else filled


def steps_done(global_steps: int) -> int:
    """Optimizer steps before this one: verl counts the step that it is in, from 1."""
    return max(0, int(global_steps) - 1)


def pack_schedule(progress: float, step: int) -> str:
    """The place of a step in the training, for the actor's loss."""
    return json.dumps([progress, step])


def read_schedule(packed: Any) -> dict[str, Any]:
    """`progress` and `step` of a batch; nothing where the driver said nothing."""
    if not packed:
        return {}
    progress, step = json.loads(packed)
    return {"progress": progress, "step": step}
