"""Some rows at a time give what all rows at once give, bit for bit, where the others do not act on them."""

from dataclasses import replace

import pytest
import torch
from batches import Case, all_cases, make_batch

from tokencredit import assign_credit
from tokencredit.batch import row_ranges as tiles
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import LocalReducer
from tokencredit.methods.distillation import log_ratio as distillation
from tokencredit.methods.distillation.log_ratio import teacher_confidence
from tokencredit.pipeline import assign as credit
from tokencredit.pipeline.pipeline import Pipeline

GROUPED = [case for case in all_cases() if case.spec.scope_at(case.hyperparameters) == "group"]
CASES = [case for case in all_cases() if case.spec.scope_at(case.hyperparameters) in ("token", "response")]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_tiles_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = filled(make_batch(seed=5, host_advantages=True))
    whole = assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3))
    sizes = []
    monkeypatch.setattr(credit, "TILE", 3 * batch.response_mask.shape[1])
    original = credit._call

    def watched(step, inputs, generator, base):
        sizes.append((step.name, len(inputs[-1].rewards)))
        return original(step, inputs, generator, base)

    monkeypatch.setattr(credit, "_call", watched)
    tiled = assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3))
    assert torch.equal(tiled, whole)
    active = [step.name for step in Pipeline.of(*case.steps).chains[0].active]  # an identity is not called
    assert sizes.count((case.name, 3)) == 3 * active.count(case.name)  # eleven rows: three of three, and two
    assert sizes.count((case.name, 2)) == active.count(case.name)


def filled(batch: TokenBatch) -> TokenBatch:
    """The same batch without an empty response: those take part in nothing."""
    first = torch.arange(batch.response_mask.shape[1]) == 0
    return replace(batch, response_mask=batch.response_mask | (first & ~batch.counted[:, None]))


def by_group(batch: TokenBatch) -> TokenBatch:
    """The same batch with neighbours in a group."""
    order = batch.group_ids.argsort(stable=True)
    return replace(batch, **{name: value[order] for name, value in batch.tensors().items()})


@pytest.mark.parametrize("case", GROUPED, ids=repr)
def test_whole_groups_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = by_group(filled(make_batch(seed=5, groups=(4, 2, 1, 3, 1), host_advantages=True)))
    whole = assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3))
    groups = []
    monkeypatch.setattr(credit, "TILE", 3 * batch.response_mask.shape[1])
    original = credit._call

    def watched(step, inputs, generator, base):
        groups.append((step.name, inputs[-1].group_ids.bincount(minlength=100).tolist()))
        return original(step, inputs, generator, base)

    monkeypatch.setattr(credit, "_call", watched)
    batch = replace(batch, group_ids=batch.group_ids - batch.group_ids.min())
    assert torch.equal(assign_credit(list(case.steps), batch, generator=torch.Generator().manual_seed(3)), whole)
    active = [step.name for step in Pipeline.of(*case.steps).chains[0].active]
    seen = [counts for name, counts in groups if name == case.name]
    assert len(seen) > active.count(case.name)
    assert max(sum(counts) for counts in seen) == 4  # the largest group, more than a tile
    full = batch.group_ids.bincount(minlength=100).tolist()
    assert all(count in (0, full[group]) for counts in seen for group, count in enumerate(counts))


def test_rows_that_act_on_each_other_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks(LocalReducer):
        pass

    batch = filled(make_batch(seed=5))
    together = by_group(batch)
    monkeypatch.setattr(credit, "TILE", 1)
    monkeypatch.setattr(TokenBatch, "rows", None)  # tiles are made with it
    assign_credit(["group_centered", "gtpo"], batch)  # the rows of a group are not neighbours
    with pytest.raises(TypeError):
        assign_credit(["group_centered"], together)
    monkeypatch.setattr(tiles, "LocalReducer", Ranks)  # over ranks every process must make the same calls
    assign_credit(["group_centered", "empg", "surprisal"], together)


@pytest.mark.parametrize(("window", "q"), [(64, 0.9), (7, 0.5), (1, 0.9), (5, 0.0), (64, 0.0), (90, 0.9), (2, 1.0)])
def test_windows_in_blocks_are_the_windows_one_by_one(window: int, q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(seed=6, response=90, groups=(3, 2), holes=False)
    batch = replace(batch, response_mask=torch.arange(90) < torch.tensor([[90], [89], [64], [65], [1]]))
    ones = torch.ones(5, 90)
    fast = teacher_confidence(ones, batch, window=window, q=q)
    monkeypatch.setattr(distillation, "FEW", 0)  # every window on its own
    torch.testing.assert_close(fast, teacher_confidence(ones, batch, window=window, q=q), rtol=1e-13, atol=1e-13)
