"""Fields from TRL's own passes: the numbers of a pass of their own, and how many passes a step runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer
from trl_setup import ALPHABET, config, trainer

from tokencredit import TokenCreditError
from tokencredit.adapters.trl.taps import draws_dropout
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.collect.adapter_residual import adapter_residuals
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.models import backbone_of
from tokencredit.collect.rollout import Rollout
from tokencredit.lab.model import build_model, build_tokenizer

LORA = LoraConfig(r=2, target_modules="all-linear")
BOTH = "0.5 * arca + 0.5 * attention"
OWN = {
    "attention_entropies": lambda rollout: attention_entropies(rollout.model, *rollout.sequences()),
    "adapter_residuals": lambda rollout: adapter_residuals(rollout.model, *rollout.sequences())[0],
}
SETTINGS = {
    "loss": {},
    "loss, with KL": {"beta": 0.1},
    "loss, two micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1},
    "old log-probs": {"num_iterations": 2},
    "old log-probs, with KL": {"num_iterations": 2, "beta": 0.1},
    "rollout": {"timing": "rollout"},
    "rollout, with KL": {"timing": "rollout", "beta": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
}


def run(folder: Path, credit: Any, settings: dict[str, Any], **extra: Any) -> tuple[Any, list]:
    settings = {"max_steps": 3} | settings
    timing = settings.pop("timing", "auto")
    built = trainer(
        CreditGRPOTrainer,
        config(folder / "out", **settings),
        credit=credit,
        timing=timing,
        records=folder / "records",
        **extra,
    )
    built.train()
    return built, list(RecordStore(folder / "records"))


@pytest.mark.parametrize("name", SETTINGS)
def test_tapped_passes_give_the_numbers_of_own_passes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built, tapped = run(tmp_path / "tapped", BOTH, dict(SETTINGS[name]), peft_config=LORA)
    assert built._taps.fields == {"attention_entropies", "adapter_residuals"}
    torch.manual_seed(0)
    other, own = run(tmp_path / "own", BOTH, dict(SETTINGS[name]), peft_config=LORA, collectors=OWN)
    assert other._taps.fields == set()
    assert [record.step for record in tapped] == [record.step for record in own]
    moved = 0.0
    for one, two in zip(tapped, own, strict=True):
        mask = one.batch.response_mask
        assert torch.equal(one.batch.response_ids, two.batch.response_ids)
        for field in ("attention_entropies", "adapter_residuals"):
            first, second = getattr(one.batch, field)[mask], getattr(two.batch, field)[mask]
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.advantages, two.advantages, rtol=1e-4, atol=1e-5)
        moved = float(one.batch.adapter_residuals[mask].max())
    assert moved > 1e-3, "the adapter must have moved, else the residuals are all zero"


def test_rows_options_and_layers_reach_the_tap(tmp_path: Path) -> None:
    options = {"layer": [0, 1], "heads": "mean_entropy", "row": "own", "drop_sink": 1, "context": "total"}
    given = {"attention_entropies": options, "adapter_residuals": {"layer": "mean_all"}}
    settings = {"beta": 0.1, "max_steps": 2}
    _, tapped = run(tmp_path / "tapped", BOTH, settings, peft_config=LORA, collectors=given)
    own = {
        "attention_entropies": lambda rollout: attention_entropies(rollout.model, *rollout.sequences(), **options),
        "adapter_residuals": lambda rollout: adapter_residuals(rollout.model, *rollout.sequences(), "mean_all")[0],
    }
    _, wanted = run(tmp_path / "own", BOTH, settings, peft_config=LORA, collectors=own)
    mask = tapped[1].batch.response_mask
    for field in own:
        first, second = getattr(tapped[1].batch, field)[mask], getattr(wanted[1].batch, field)[mask]
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
        assert first.abs().max() > 0


def passes(kind: type, folder: Path, settings: dict[str, Any], **extra: Any) -> int:
    """Forward passes of the backbone in one step, those of sampling among them."""
    built = trainer(kind, config(folder, max_steps=1, **settings), **extra)
    seen: list[int] = []
    backbone_of(built.model).register_forward_hook(lambda *_: seen.append(1))
    built.train()
    return len(seen)


@pytest.mark.parametrize(
    ("credit", "settings", "more"),
    [
        ("attention", {}, 0),  # the forward of the loss
        ("attention", {"num_iterations": 2}, 0),  # the old log-probs
        ("arca", {"beta": 0.1}, 0),  # the loss and the KL reference
        ("arca", {"beta": 0.1, "num_iterations": 2}, 0),
        ("arca", {}, 1),  # the reference pass that TRL does not run
        ("arca", {"num_iterations": 2}, 1),
        (BOTH, {"beta": 0.1}, 0),
    ],
)
def test_no_pass_that_trl_runs_is_run_again(credit: str, settings: dict[str, Any], more: int, tmp_path: Path) -> None:
    stock = passes(GRPOTrainer, tmp_path / "stock", settings, peft_config=LORA)
    assert passes(CreditGRPOTrainer, tmp_path / "ours", settings, peft_config=LORA, credit=credit) == stock + more


def test_tapping_leaves_training_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    for kind, extra in (
        (GRPOTrainer, {}),
        (
            CreditGRPOTrainer,
            {"credit": ["group_normalized", {"attention_schedule": {"beta": 0.0}}, {"adapter_residual": {"mix": 0.0}}]},
        ),
    ):
        torch.manual_seed(0)
        built = trainer(kind, config(tmp_path / kind.__name__, beta=0.1), peft_config=LORA, **extra)
        built.train()
        weights.append([value.detach().clone() for value in built.model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_dropout_means_a_pass_of_its_own(tmp_path: Path) -> None:
    dropping = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    built, (_, second, _) = run(tmp_path, "arca", {}, peft_config=dropping)
    assert draws_dropout(built.model)
    assert built._taps.fields == set()
    assert second.batch.adapter_residuals.abs().max() > 0
    assert not draws_dropout(build_model(build_tokenizer(ALPHABET), layers=1, width=16, heads=2, seed=1))


def test_a_reference_without_kl_needs_an_adapter(tmp_path: Path) -> None:
    _, (_, second, _) = run(tmp_path, "policy_divergence", {}, peft_config=LORA)
    gap = (second.batch.ref_logprobs - second.batch.old_logprobs)[second.batch.response_mask]
    assert 1e-5 < float(gap.abs().max()) < 1.0  # one small step away from the reference
    with pytest.raises(TokenCreditError, match="needs `ref_logprobs`"):
        run(tmp_path / "full", "policy_divergence", {})


def test_the_gate_reads_doubling_ratios(tmp_path: Path) -> None:
    gated = ["group_normalized", {"adapter_residual": {"gate": 1.8}}]
    _, (first, second, _) = run(tmp_path, gated, {}, peft_config=LORA, collectors={"doubling_ratios": {"rows": 3}})
    assert bool(torch.isnan(first.batch.doubling_ratios).all())  # B = 0: nothing to double
    assert second.batch.doubling_ratios.tolist() == pytest.approx([2.0] * 8, abs=0.2)


def test_distances_and_influences_share_a_pass(tmp_path: Path) -> None:
    seen: list[Rollout] = []
    built = trainer(CreditGRPOTrainer, config(tmp_path, max_steps=1), credit="attention_illuminates")
    for name in ("attention_distances", "attention_influences"):
        plain = built.collectors[name]
        built.collectors[name] = lambda rollout, plain=plain: (seen.append(rollout), plain(rollout))[1]
    built.train()
    assert seen[0] is seen[1]
    assert list(seen[0].shared) == ["tokencredit.collect.collectors:attention_rhythms_of"]  # one call
