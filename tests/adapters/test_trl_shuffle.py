"""Micro-batches of whole groups: group credit in the forward of the loss, with the numbers of a pass of its own."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl_setup import config, train, trainer

from tokencredit import TokenCreditError
from tokencredit.adapters.trl.batch import RowKeys
from tokencredit.adapters.trl.shuffle import group_order, regroup
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.records import CreditRecord
from tokencredit.batch.store import RecordStore

SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def test_rows_of_a_group_end_up_side_by_side() -> None:
    assert group_order([2, 0, 2, 1, 0, 1], 3) == [0, 2, 1, 4, 3, 5]
    assert group_order([0, 1, 0, 1, 2, 3, 2, 3], 2) == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(TokenCreditError, match="micro-batches of 2 rows cut the group 1 apart"):
        group_order([0, 1, 0, 1, 1, 1], 3)


def test_every_kind_of_value_moves_with_its_row() -> None:
    def batch(groups: list[int], rows: list[int]) -> dict[str, Any]:
        images = [1 + row % 2 for row in rows]  # one or two images per row, of one row of pixels each
        return {
            RowKeys.GROUP: torch.tensor(groups),
            "completion_ids": torch.tensor([[row, row] for row in rows]),
            "num_items_in_batch": torch.tensor(9),
            "ref_per_token_logps": None,
            "num_images": images,
            "pixel_values": torch.cat(
                [torch.full((count, 1), float(row)) for row, count in zip(rows, images, strict=True)]
            ),
        }

    before = [batch([0, 1], [0, 1]), batch([1, 0], [2, 3])]
    (one, two), current = regroup(before, before[1])
    assert current is two
    assert one["completion_ids"][:, 0].tolist() == [0, 3] and two["completion_ids"][:, 0].tolist() == [1, 2]
    assert one["num_images"] == [1, 2] and one["pixel_values"].flatten().tolist() == [0.0, 3.0, 3.0]
    assert two["num_images"] == [2, 1] and two["pixel_values"].flatten().tolist() == [1.0, 1.0, 2.0]
    assert int(one["num_items_in_batch"]) == int(two["num_items_in_batch"]) == 9
    assert one["ref_per_token_logps"] is None


def _records(folder: Path, timing: str, credit: Any = "hapo", **changes: Any) -> list[CreditRecord]:
    settings = config(folder / "out", **(SPLIT | {"max_steps": 1} | changes))
    built = trainer(CreditGRPOTrainer, settings, credit=credit, timing=timing, records=folder / "records")
    built.train()
    return list(RecordStore(folder / "records"))


@pytest.mark.parametrize("credit", ["hapo", "gtpo", "success_trie"])
def test_group_credit_at_update_is_that_at_rollout(credit: str, tmp_path: Path) -> None:
    (update,) = _records(tmp_path / "a", "update", credit)
    (rollout,) = _records(tmp_path / "b", "rollout", credit)
    assert torch.equal(update.batch.response_ids, rollout.batch.response_ids)
    assert update.batch.group_ids.tolist() == [group for group in range(4) for _ in range(4)]
    torch.testing.assert_close(update.advantages, rollout.advantages, rtol=1e-6, atol=1e-6)


def test_accumulation_costs_group_methods_no_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    built = trainer(CreditGRPOTrainer, config(tmp_path, max_steps=2, **SPLIT), credit="hapo")
    assert built.timing == "update"
    built.train()
    assert calls == [True] * 8  # the forwards of the loss and no other


def test_whole_groups_survive_inner_updates(tmp_path: Path) -> None:
    """Buffered micro-batches are used twice; both times they hold whole groups."""
    seen: list[list[int]] = []

    class Watched(CreditGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            seen.append(inputs[RowKeys.GROUP].tolist())
            return super()._compute_loss(model, inputs)

    settings = config(tmp_path, max_steps=4, num_iterations=2, **SPLIT)
    trainer(Watched, settings, credit="hapo", timing="update").train()
    assert len(seen) == 16 and all(len(set(groups)) == 1 for groups in seen)
    assert seen[:4] == seen[4:8]
    assert [groups[0] for groups in seen[:4]] != [0, 1, 2, 3]  # shuffled by TRL


def test_identity_keeps_the_shuffle_of_the_host(tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "a", **SPLIT))
    ours = train(CreditGRPOTrainer, config(tmp_path / "b", **SPLIT), credit="grpo", timing="update")
    assert stock == ours
