"""The private seams of TRL's GRPOTrainer that CreditGRPOTrainer stands on, by signature and by behaviour."""

from pathlib import Path
from typing import Any

import pytest
import torch
from seams import expect, moved
from trl import GRPOTrainer
from trl_setup import config, train, trainer

from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.batch import RowKeys
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.doctor import hosts as doctor

# What the rollout's dictionary holds, by number of axes.
ROLLOUT = {"prompt_ids": 2, "prompt_mask": 2, "completion_ids": 2, "completion_mask": 2, "advantages": 1}
ATTRIBUTES = (
    "_buffered_inputs",
    "_metrics",
    "_step",
    "accelerator",
    "args",
    "model",
    "num_generations",
    "num_iterations",
    "processing_class",
    "reward_weights",
    "state",
    "temperature",
    "use_vllm",
    "vllm_importance_sampling_correction",
)


class Watched(CreditGRPOTrainer):
    """Keeps what TRL hands over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        self.seen["rewards"] = super()._calculate_rewards(*args, **kwargs)
        return self.seen["rewards"]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.seen["scored"] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.seen["scored"]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.seen["rollout"] = super()._generate_and_score_completions(inputs)
        return dict(self.seen["rollout"])

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.seen["loss"] = dict(inputs)
        return super()._compute_loss(model, inputs)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    built = trainer(Watched, config(folder / "out", max_steps=1), credit="hapo", records=folder / "records")
    built.train()
    return built


@pytest.mark.parametrize("name", doctor.TRL_SEAMS)
def test_signatures(name: str) -> None:
    found = doctor._seam(doctor._methods_of_trainer(), name, doctor.TRL_SEAMS[name])
    assert found["status"] == "ok", moved("trl", found["name"], found["found"], doctor.TRL_SEAMS[name])


def test_the_version_is_one_that_is_supported() -> None:
    trl_checks.check_versions()


def test_attributes_that_the_adapter_reads(watched: Watched) -> None:
    missing = [name for name in ATTRIBUTES if not hasattr(watched, name)]
    expect("trl", "attributes of GRPOTrainer", missing, [])
    expect("trl", "GRPOTrainer._metrics", sorted(watched._metrics), ["eval", "train"])


def test_the_rollout_dictionary(watched: Watched) -> None:
    rollout = watched.seen["rollout"]
    found = {name: rollout[name].ndim if name in rollout else None for name in ROLLOUT}
    expect("trl", "axes in the result of _generate_and_score_completions", found, ROLLOUT)
    expect("trl", "dtype of its advantages", rollout["advantages"].dtype, torch.float32)
    expect("trl", "shape of the result of _calculate_rewards", tuple(watched.seen["rewards"].shape), (8, 1))


def test_log_probs_and_entropies(watched: Watched) -> None:
    scored = watched.seen["scored"]
    assert len(scored) in (2, 3), moved("trl", "_get_per_token_logps_and_entropies", len(scored), "2 or 3 values")
    shape = watched.seen["loss"]["completion_ids"].shape
    expect("trl", "shape of log-probs and entropies", [scored[0].shape, scored[1].shape], [shape, shape])


def test_keys_of_ours_travel_with_their_rows(watched: Watched) -> None:
    rollout, loss = watched.seen["rollout"], watched.seen["loss"]
    moved_rows = loss[RowKeys.ROW]
    expect("trl", "rows behind the shuffle", sorted(moved_rows.tolist()), list(range(8)))
    for name in (RowKeys.GROUP, RowKeys.REWARD, RowKeys.HOST, "completion_ids"):
        same = torch.equal(loss[name], rollout[name][moved_rows])
        expect("trl", f"{name} shuffled with the rows", same, True)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "cispo"])
def test_advantages_by_token_are_taken_bit_for_bit(loss_type: str, tmp_path: Path) -> None:
    class Broadcast(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            wide = inputs["advantages"][:, None].expand(inputs["completion_ids"].shape)
            return super()._compute_loss(model, {**inputs, "advantages": wide})

    stock = train(GRPOTrainer, config(tmp_path / "stock", loss_type=loss_type, max_steps=2))
    wide = train(Broadcast, config(tmp_path / "wide", loss_type=loss_type, max_steps=2))
    expect("trl", f"loss_type={loss_type} on advantages [batch, response]", wide, stock)


def test_an_identity_pipeline_is_the_stock_trainer(tmp_path: Path) -> None:
    stock = train(GRPOTrainer, config(tmp_path / "stock", max_steps=2))
    ours = train(CreditGRPOTrainer, config(tmp_path / "ours", max_steps=2), credit="grpo", records=tmp_path / "records")
    expect("trl", "losses, norms and weights under an identity pipeline", ours, stock)


def test_several_updates_find_the_buffered_rows_unchanged(tmp_path: Path) -> None:
    extra = {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    records = tmp_path / "records"
    built = trainer(CreditGRPOTrainer, config(tmp_path / "out", **extra), credit="hapo", records=records)
    expect("trl", "timing of hapo with two updates a rollout batch", built.timing, "rollout")
    built.train()
    expect("trl", "rollout batches of three updates", RecordStore(records).steps, [0, 2])


def test_a_sequence_ratio_erases_token_credit(tmp_path: Path) -> None:
    """The reason of a refusal; when it fails, the refusal can go."""
    built = trainer(GRPOTrainer, config(tmp_path, importance_sampling_level="sequence", loss_type="grpo", max_steps=1))
    caught = {}

    class Stop(Exception):
        pass

    def catch(model: Any, inputs: Any) -> Any:
        caught.update(inputs)
        raise Stop

    original, built._compute_loss = built._compute_loss, catch
    with pytest.raises(Stop):
        built.train()
    losses = []
    for twist in (0.0, 3.0):
        wide = caught["advantages"][:, None].expand(caught["completion_ids"].shape).clone()
        half = caught["completion_mask"].sum(1) // 2
        wide[:, 0] += twist
        wide[torch.arange(len(wide)), half] -= twist
        built.current_gradient_accumulation_steps = 1
        built.model.zero_grad()
        original(built.model, {**caught, "advantages": wide}).backward()
        losses.append(torch.cat([value.grad.flatten() for value in built.model.parameters() if value.grad is not None]))
    change = float((losses[0] - losses[1]).norm() / losses[0].norm())
    assert change < 1e-4, moved("trl", "gradient under importance_sampling_level='sequence'", change, "no change")
