"""Statistics over groups and batches that do not depend on how the rows are spread over processes.

Everything is a sum, a count, an extremum or a histogram, so that two ranks give what one rank gives: sums are taken in
float64 and order statistics are found exactly by counting (never by gathering and sorting).
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEW_LABELS = 1023  # groups of one rank that one exchange carries; more take a second
RADIX = 1 << 16  # bins of one counting pass; two passes resolve all 32 bits of a float


@runtime_checkable
class Reducer(Protocol):
    """Where sums, counts and extrema over all rows of a batch are taken."""

    def total(self, local: Tensor) -> Tensor:
        """Sum over processes of a tensor that has the same shape on each."""
        ...

    def maximum(self, local: Tensor) -> Tensor:
        """Elementwise maximum over processes."""
        ...

    def labels(self, group_ids: Int[Tensor, " batch"]) -> Int[Tensor, " label"]:
        """The sorted distinct group ids of all processes."""
        ...


class LocalReducer:
    """One process holds all rows."""

    def total(self, local: Tensor) -> Tensor:
        return local

    def maximum(self, local: Tensor) -> Tensor:
        return local

    def labels(self, group_ids: Int[Tensor, " batch"]) -> Int[Tensor, " label"]:
        return group_ids.unique()


class ProcessGroupReducer:
    """Rows are spread over the ranks of a `torch.distributed` process group; every rank makes the same calls.

    Ranks may hold different numbers of rows, none included. Group ids must mean the same group on every rank.
    """

    def __init__(self, process_group: "torch.distributed.ProcessGroup | None" = None) -> None:
        self.process_group = process_group

    def total(self, local: Tensor) -> Tensor:
        summed = local.clone()
        torch.distributed.all_reduce(summed, torch.distributed.ReduceOp.SUM, group=self.process_group)
        return summed

    def maximum(self, local: Tensor) -> Tensor:
        largest = local.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return largest

    def labels(self, group_ids: Int[Tensor, " batch"]) -> Int[Tensor, " label"]:
        labels = group_ids.unique().long()
        rows = self._gather(labels, FEW_LABELS)
        counts = rows[:, 0].tolist()
        if max(counts) > FEW_LABELS:  # every rank sees it
            rows = self._gather(labels, max(counts))
        return torch.cat([row[1 : 1 + count] for row, count in zip(rows, counts, strict=True)]).unique()

    def _gather(self, labels: Int[Tensor, " label"], most: int) -> Int[Tensor, "rank place"]:
        """The number of labels of each rank and at most `most` of them."""
        count = torch.full((1,), labels.numel(), device=labels.device)
        padded = torch.cat((count, labels[:most], labels.new_zeros(max(0, most - labels.numel()))))
        rows = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size(self.process_group))]
        torch.distributed.all_gather(rows, padded, group=self.process_group)
        return torch.stack(rows)


LOCAL = LocalReducer()


def numbered(labels: Int[Tensor, " batch"], reducer: Reducer = LOCAL) -> tuple[Int[Tensor, " batch"], int]:
    """A number for each distinct label, the same on all processes, and how many numbers there are at most.

    On one process the host does not look at the labels, so that a GPU need not be waited for.
    """
    if not isinstance(reducer, LocalReducer):
        shared = reducer.labels(labels)
        return torch.searchsorted(shared, labels.to(shared.dtype)), shared.numel()
    order = labels.argsort(stable=True)
    ordered = labels[order]
    starts = torch.zeros_like(order)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0)), labels.numel()


def group_totals(
    stats: Float[Tensor, "batch stat"], group_ids: Int[Tensor, " batch"], reducer: Reducer = LOCAL
) -> Float[Tensor, "batch stat"]:
    """Sum of each column over the rows of a group, on all processes; row i holds the totals of its own group."""
    index, count = numbered(group_ids, reducer)
    table = stats.new_zeros(count, stats.shape[1]).index_add_(0, index, stats)
    return reducer.total(table)[index]


def extrema(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], reducer: Reducer = LOCAL
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The least and the greatest masked value of all processes, in one exchange of two numbers; (∞, −∞) of none."""
    ends = values.new_full((2,), -torch.inf)
    if values.numel():
        nothing = values.new_full((), torch.inf)
        ends = torch.stack((torch.where(mask, values, -nothing).amax(), -torch.where(mask, values, nothing).amin()))
    greatest, least = reducer.maximum(ends).unbind()
    return -least, greatest


def kth_smallest(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], rank: int, reducer: Reducer = LOCAL
) -> float:
    """The value of 0-based `rank` among the masked float32 values of all processes, exact.

    On one CPU by selection, elsewhere in two counting passes.
    """
    if type(reducer) is LocalReducer and values.device.type == "cpu":
        count = np.count_nonzero(mask.numpy())
        if not 0 <= rank < count:
            raise IndexError(f"rank {rank} of {count} values")
        # What is not chosen comes last; + 0.0 turns −0 into 0.
        whole = torch.where(mask, values.detach().float() + 0.0, torch.inf).flatten().numpy()
        return float(np.partition(whole, rank)[rank])
    keys = _sortable(values[mask].float())  # 0 ... 2³² − 1, in the order of the floats
    high, low = keys // RADIX, keys % RADIX
    upper, below = _locate(torch.bincount(high, minlength=RADIX), rank, reducer)
    lower, _ = _locate(torch.bincount(low[high == upper], minlength=RADIX), rank - below, reducer)
    return _unsortable(upper * RADIX + lower)


def quantile(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], q: float, reducer: Reducer = LOCAL
) -> float:
    """Linear-interpolated quantile of the masked values of all processes; NaN when there is none.

    Any number of values: `torch.quantile` refuses more than 2²⁴.
    """
    count = int(reducer.total(mask.sum()))
    if count == 0:
        return float("nan")
    at = q * (count - 1)
    low = kth_smallest(values, mask, int(at), reducer)
    high = kth_smallest(values, mask, min(int(at) + 1, count - 1), reducer)
    return low + (high - low) * (at - int(at))


def _locate(local_counts: Int[Tensor, " bin"], rank: int, reducer: Reducer) -> tuple[int, int]:
    """The bin that holds `rank`, and how many values lie in the bins before it."""
    counts = reducer.total(local_counts)
    cumulative = counts.cumsum(0)
    if not 0 <= rank < int(cumulative[-1]):
        raise IndexError(f"rank {rank} of {int(cumulative[-1])} values")
    found = int(torch.searchsorted(cumulative, torch.tensor(rank, device=counts.device), right=True))
    return found, int(cumulative[found] - counts[found])


def _sortable(values: Float[Tensor, " token"]) -> Int[Tensor, " token"]:
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0 turns −0 into 0: they compare equal
    return torch.where(bits >= 0, bits + (1 << 31), -1 - bits)


def _unsortable(key: int) -> float:
    bits = key - (1 << 31) if key >= 1 << 31 else -1 - key
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
