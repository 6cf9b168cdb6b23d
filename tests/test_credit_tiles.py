"""Some rows at a time give what all rows at once give, bit for bit, where the others do not act on them."""

from dataclasses import replace

import pytest
import torch
from batches import Case, all_cases, make_batch

from tokencredit import assign_credit
from tokencredit.batch import masked, row_ranges
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import LocalReducer
from tokencredit.methods.distillation import log_ratio as distillation
from tokencredit.methods.distillation.log_ratio import teacher_confidence
from tokencredit.pipeline import assign
from tokencredit.pipeline.pipeline import Pipeline

GROUPED = [case for case in all_cases() if case.spec.scope_at(case.hyperparameters) == "group"]
CASES = [case for case in all_cases() if case.spec.scope_at(case.hyperparameters) in ("token", "response")]
BATCHWIDE = [case for case in all_cases() if case.spec.scope_at(case.hyperparameters) == "batch"]


def whole_and_cut(
    case: Case, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The credit with all rows at once and with three at a time, and the group ids that the case then saw."""
    whole = assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(row_ranges, "TILE", 3 * batch.response_mask.shape[1])
    monkeypatch.setattr(masked, "BLOCK", 3 * batch.response_mask.shape[1])
    original = assign._call

    def watched(step, inputs, generator, base):
        if step.name == case.name:
            seen.append(inputs[-1].group_ids)
        return original(step, inputs, generator, base)

    monkeypatch.setattr(assign, "_call", watched)
    return whole, assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3)), seen


def in_blocks(case: Case) -> bool:
    """Whether every step of the case bounds its own temporaries, so that `assign_credit` cuts nothing."""
    return all(step.spec.in_blocks for step in Pipeline.of(*case.steps).chains[0].active)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_tiles_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = filled(make_batch(seed=5, host_advantages=True))
    whole, tiled, seen = whole_and_cut(case, batch, monkeypatch)
    assert torch.equal(tiled, whole)
    active = [step.name for step in Pipeline.of(*case.steps).chains[0].active]  # an identity is not called
    expected = [11] if in_blocks(case) else [3, 3, 3, 2]
    assert [len(ids) for ids in seen] == (expected if case.name in active else [])


def filled(batch: TokenBatch) -> TokenBatch:
    """The same batch without an empty response: those take part in nothing."""
    first = torch.arange(batch.response_mask.shape[1]) == 0
    return replace(batch, response_mask=batch.response_mask | (first & ~batch.counted[:, None]))


def by_group(batch: TokenBatch) -> TokenBatch:
    """The same batch with neighbours in a group."""
    order = batch.group_ids.argsort(stable=True)
    return replace(batch, **{name: value[order] for name, value in batch.tensors().items()})


@pytest.mark.parametrize("case", GROUPED, ids=repr)
@pytest.mark.parametrize("together", [True, False])
def test_whole_groups_change_nothing(case: Case, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = filled(make_batch(seed=5, groups=(4, 2, 1, 3, 1), host_advantages=True))
    batch = by_group(batch) if together else batch
    whole, tiled, seen = whole_and_cut(case, batch, monkeypatch)
    assert torch.equal(tiled, whole)
    if not seen or in_blocks(case):
        return
    assert len(seen) > 1 and max(len(ids) for ids in seen) == 4  # the largest group, more than a tile
    size = dict(zip(*(part.tolist() for part in batch.group_ids.unique(return_counts=True)), strict=True))
    for ids in seen:
        labels, counts = (part.tolist() for part in ids.unique(return_counts=True))
        assert counts == [size[label] for label in labels]


@pytest.mark.parametrize("case", BATCHWIDE, ids=repr)
def test_blocks_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = filled(make_batch(seed=5, host_advantages=True))
    whole, cut, seen = whole_and_cut(case, batch, monkeypatch)
    assert torch.equal(cut, whole)
    assert all(len(ids) == 11 for ids in seen)


def test_rows_that_act_on_each_other_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks(LocalReducer):
        pass

    batch = filled(make_batch(seed=5))
    monkeypatch.setattr(row_ranges, "TILE", 1)
    monkeypatch.setattr(TokenBatch, "rows", None)  # tiles are made with it
    with pytest.raises(TypeError):
        assign_credit(["group_centered", "gtpo"], batch)
    assign_credit(["group_centered", "gtpo", "steer"], batch)  # acts on the whole batch
    monkeypatch.setattr(row_ranges, "LocalReducer", Ranks)  # over ranks every process must make the same calls
    assign_credit(["group_centered", "gtpo", "reverse"], batch)


@pytest.mark.parametrize(("window", "q"), [(64, 0.9), (7, 0.5), (1, 0.9), (5, 0.0), (64, 0.0), (90, 0.9), (2, 1.0)])
def test_windows_in_blocks_are_the_windows_one_by_one(window: int, q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(seed=6, response=90, groups=(3, 2), holes=False)
    batch = replace(batch, response_mask=torch.arange(90) < torch.tensor([[90], [89], [64], [65], [1]]))
    ones = torch.ones(5, 90)
    fast = teacher_confidence(ones, batch, window=window, q=q)
    monkeypatch.setattr(distillation, "FEW", 0)  # every window on its own
    torch.testing.assert_close(fast, teacher_confidence(ones, batch, window=window, q=q), rtol=1e-13, atol=1e-13)
