"""Micro-batches of whole groups, so that group statistics can be taken in the forward of the loss.

TRL shuffles the rows of a rollout batch and then cuts it into `steps_per_generation` micro-batches, so the responses of
one prompt end up in several of them. Here the shuffled rows are put together again by group, in the order in which the
shuffle first names each group. No random number is drawn for it, and every process holds whole groups: it has as many
rows as its micro-batches together, and TRL deals rows to processes in order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from tokencredit.adapters.trl.batch import RowKeys
from tokencredit.adapters.trl.checks import steps_per_generation
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.pipeline import Pipeline

MicroBatch = Mapping[str, Any]


def needs_whole_groups(timing: str, pipeline: Pipeline, config: Any) -> bool:
    """Whether TRL's shuffled rows are to be put together by group again before they are cut into micro-batches."""
    grouped = timing == "update" and pipeline.scope == "group" and not pipeline.is_identity
    return grouped and steps_per_generation(config) > 1


def regroup(micro_batches: Sequence[MicroBatch], current: MicroBatch) -> tuple[list[MicroBatch], MicroBatch]:
    """The same rows in as many micro-batches of the same size, each of whole groups; and the one in place of `current`.

    Raises:
      TokenCreditError: if groups do not fit into micro-batches, as after `auto_find_batch_size` has halved them.
    """
    order = group_order(torch.cat([batch[RowKeys.GROUP] for batch in micro_batches]).tolist(), len(micro_batches))
    rows = [split_pixel_values_by_grid(dict(batch)) for batch in micro_batches]
    whole = {name: _select([batch[name] for batch in rows], order) for name in rows[0]}
    regrouped = [unsplit_pixel_values_by_grid(batch) for batch in split_tensor_dict(whole, len(micro_batches))]
    return regrouped, next(new for new, old in zip(regrouped, micro_batches, strict=True) if old is current)


def group_order(groups: Sequence[int], micro_batches: int) -> list[int]:
    """Row numbers with the rows of a group side by side, groups by their first row; refuses groups that are cut."""
    first: dict[int, int] = {}
    for group in groups:
        first.setdefault(group, len(first))
    order = sorted(range(len(groups)), key=lambda row: first[groups[row]])
    size = len(groups) // micro_batches
    for start in range(size, len(order), size):
        if groups[order[start - 1]] == groups[order[start]]:
            raise TokenCreditError(
                f"micro-batches of {size} rows cut the group {groups[order[start]]} apart, which credit needs whole",
                hint="use timing='rollout', or a per_device_train_batch_size that is a multiple of num_generations",
            )
    return order


def _select(parts: Sequence[Any], order: Sequence[int]) -> Any:
    """Rows of a value of all micro-batches; a value that is not one per row is that of the first."""
    if parts[0] is None or (isinstance(parts[0], Tensor) and parts[0].ndim == 0):
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[torch.tensor(order, device=parts[0].device)]
    joined = [item for part in parts for item in part]
    return [joined[row] for row in order]
