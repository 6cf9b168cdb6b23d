"""With a pipeline that changes nothing, training is the stock trainer's, bit for bit."""

from pathlib import Path

import pytest
from trl import GRPOTrainer
from trl_setup import config, train

from tokencredit.adapters.trl.trainer import CreditGRPOTrainer

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


class BroadcastTrainer(GRPOTrainer):
    """The stock trainer with its advantages repeated over the tokens."""

    def _compute_loss(self, model, inputs):
        wide = inputs["advantages"][:, None].expand(inputs["completion_ids"].shape)
        return super()._compute_loss(model, {**inputs, "advantages": wide})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_identity_is_bit_identical_for_every_loss(loss_type: str, tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock", loss_type=loss_type))
    ours = train(CreditGRPOTrainer, config(tmp_path / "ours", loss_type=loss_type), credit="grpo")
    assert ours == stock


@pytest.mark.parametrize("credit", [{"hapo": {"alpha": 0.0}}, ["group_normalized", {"top_entropy": {"keep": 1.0}}]])
def test_strength_zero_is_bit_identical(credit: object, tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock"))
    assert train(CreditGRPOTrainer, config(tmp_path / "ours"), credit=credit) == stock


def test_recording_changes_nothing(tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock"))
    ours = train(CreditGRPOTrainer, config(tmp_path / "ours"), credit="grpo", records=tmp_path / "records")
    assert ours == stock
    hapo = train(CreditGRPOTrainer, config(tmp_path / "a"), credit="hapo")
    assert train(CreditGRPOTrainer, config(tmp_path / "b"), credit="hapo", records=tmp_path / "more") == hapo


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_constant_token_advantages_equal_response_advantages(loss_type: str, tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock", loss_type=loss_type))
    assert train(BroadcastTrainer, config(tmp_path / "wide", loss_type=loss_type)) == stock


def test_several_inner_updates_stay_bit_identical(tmp_path: Path) -> None:
    extra = {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stock = train(GRPOTrainer, config(tmp_path / "stock", **extra))
    ours = train(CreditGRPOTrainer, config(tmp_path / "ours", **extra), credit="grpo", records=tmp_path / "records")
    assert ours == stock


def test_credit_that_is_not_identity_does_change_training(tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock"))
    assert train(CreditGRPOTrainer, config(tmp_path / "ours"), credit="hapo") != stock
