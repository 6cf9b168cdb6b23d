"""One, two and four gloo ranks train alike under every preset, groups cut between them, whatever the inner updates."""

import json
from pathlib import Path

import pytest
import torch
from processes import printed, run_ranks
from rank_runs import FREE, GROUP, LORA, REFERENCE, ROWS, SHAPES, TOURED, save_reference, train_all

from tokencredit import assign_credit, get_pipeline
from tokencredit.batch.records import CreditRecord
from tokencredit.batch.store import RecordStore
from tokencredit.methods.table import PRESETS
from tokencredit.pipeline.pipeline import Pipeline

WORLDS = (1, 2, 4)
RUNS = {**dict.fromkeys(SHAPES, TOURED), "lora": [*LORA, *LORA], "reference": [*REFERENCE] * 2}


def differences(one: CreditRecord, other: CreditRecord) -> list[str]:
    """What two records of the same rollout batch do not agree on; outside the mask anything may stand."""
    same = ("response_ids", "response_mask", "group_ids", "rewards")
    found = [name for name in same if not torch.equal(getattr(one.batch, name), getattr(other.batch, name))]
    found += [] if one.tokens == other.tokens and one.prompts == other.prompts else ["texts"]
    fields = [record.batch.tensors() | {"advantages": record.advantages} for record in (one, other)]
    for name, ours in fields[0].items():
        theirs = fields[1][name]
        if ours.ndim == 2:
            ours, theirs = ours[one.batch.response_mask], theirs[other.batch.response_mask]
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5):
            found.append(f"{name} by {float((ours.double() - theirs.double()).abs().max()):.1e}")
    # What several ranks worked out together is the pure function on the gathered batch, in one process.
    if not Pipeline.parse(other.pipeline).draws:
        pure = assign_credit(other.pipeline, other.batch)
        found += [] if torch.allclose(pure, other.advantages, rtol=1e-6, atol=1e-7) else ["the pure function"]
    return found


def test_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    reference = save_reference(tmp_path / "model")
    for world in WORLDS:
        folder = tmp_path / str(world)
        assert run_ranks(world, folder, train_all, folder, reference, world) == [0] * world, printed(folder)[-3000:]
    logs = [json.loads((tmp_path / str(world) / "found.json").read_text()) for world in WORLDS]
    wrong: dict[str, list[str]] = {}
    for run, tour in RUNS.items():
        alone, *together = (list(RecordStore(tmp_path / str(world) / run)) for world in WORLDS)
        for world, records in zip(WORLDS[1:], together, strict=True):
            for name, one, other in zip(tour, alone, records, strict=True):
                found = differences(one, other)
                wrong |= {f"{world} ranks, {run}, {name}": found} if found else {}
        for key in ("loss", "norm"):
            assert len(logs[0][run][key]) == len(tour) * SHAPES.get(run, {}).get("num_iterations", 1)
            for log in logs[1:]:
                assert log[run][key] == pytest.approx(logs[0][run][key], rel=1e-5, abs=1e-6), (run, key)
    assert wrong == {}


def test_the_tour_is_every_preset_that_needs_no_more() -> None:
    more = {name for name in PRESETS if name not in TOURED}
    assert {*LORA, *REFERENCE} < more
    assert all(get_pipeline(name).requires - FREE for name in more)
    assert ROWS % GROUP == 0 and (ROWS // 2) % GROUP and (ROWS // 4) % GROUP  # groups are cut
