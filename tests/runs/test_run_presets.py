"""Every preset that needs no teacher trains a step through what `train` and `compare` run."""

from pathlib import Path

import pytest
import torch
from support.small_runs import small_config, write_yaml

from tokencredit import assign_credit
from tokencredit.batch.store import RecordStore
from tokencredit.cli.main import main
from tokencredit.errors import TokenCreditError
from tokencredit.lab import data as lab_data
from tokencredit.methods.table import PRESETS
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.runs.config.load import load_config
from tokencredit.runs.train import train_run

LORA = {"r": 2, "target_modules": "all-linear"}
NEEDS_LORA = {"adapter_residuals", "doubling_ratios", "ref_logprobs"}


def odd_digits(completions: list[str], **_: object) -> list[float]:
    return [float(sum(character in "13579" for character in text)) for text in completions]


@pytest.fixture
def varied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within groups: an untrained model solves nothing, and then no credit moves."""
    monkeypatch.setattr(lab_data, "reward_function", lambda task: odd_digits)


def needs(preset: str) -> frozenset[str]:
    return Pipeline.parse(preset).requires


WITHOUT_TEACHER = [name for name in PRESETS if "teacher_logprobs" not in needs(name)]


@pytest.mark.parametrize("preset", WITHOUT_TEACHER)
def test_a_preset_trains_a_step(
    preset: str,
    model_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if "values" not in needs(preset):  # exact values are checked against the task's own rewards
        request.getfixturevalue("varied")
    lora = LORA if needs(preset) & NEEDS_LORA else None
    evaluation = {"every": 9, "problems": 1}
    config = load_config(small_config(model_folder, credit=preset, lora=lora, steps=1, evaluation=evaluation))
    assert train_run(config, tmp_path / "run")["status"] == "finished"
    (record,) = RecordStore(tmp_path / "run" / "records")
    assert needs(preset) <= {*record.batch.carried, "host_advantages"}
    assert bool(record.batch.response_mask.any())
    if not Pipeline.parse(preset).draws:
        # Rows are back in order here, so sums over a batch round differently.
        torch.testing.assert_close(assign_credit(preset, record.batch), record.advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("varied")
def test_a_file_sets_collectors(model_folder: Path, tmp_path: Path) -> None:
    collectors = {
        "attention_entropies": {"layer": 0, "heads": "mean_entropy", "row": "own", "drop_sink": 1},
        "adapter_residuals": {"layer": "last_prenorm_relative"},
        "doubling_ratios": {"rows": 2},
    }
    both = "0.5 * arca + 0.5 * attention"
    config = small_config(model_folder, credit=both, lora=LORA, collectors=collectors, steps=2)
    path = write_yaml(tmp_path / "config.yaml", config)
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    _, second = RecordStore(tmp_path / "run" / "records")
    entropies = second.batch.attention_entropies[second.batch.response_mask]
    assert 0 < float(entropies.max()) <= 1
    relative = second.batch.adapter_residuals[second.batch.response_mask]
    assert 0 < float(relative.max()) < 0.5  # over the norm of the state: a small step
    config = small_config(model_folder, credit={"arca": {"gate": 1.8}}, lora=LORA, collectors=collectors, steps=1)
    assert main(["train", str(write_yaml(path, config)), "--out", str(tmp_path / "gated")]) == 0


@pytest.mark.parametrize(
    ("collectors", "said"),
    [
        ({"attention_entropy": {}}, "did you mean 'attention_entropies'"),
        ({"attention_entropies": {"layers": 1}}, "did you mean 'layer'"),
        ({"attention_entropies": {"row": "mine"}}, "available: own, predicting"),
        ({"attention_entropies": {"drop_sink": -1}}, "must be a whole number of keys, got -1"),
        ({"attention_influences": {"share": 0.9}}, "must be a number in (0, 0.5], got 0.9"),
        ({"entropies": {"layer": 1}}, "the collector of `entropies` has no options"),
        ({"importances": "no_colon"}, "module:attribute"),
        ({"importances": 3}, "must be a function, its name, or a mapping of options, got 3"),
    ],
)
def test_wrong_collectors_are_refused_when_a_config_is_read(collectors: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError) as caught:
        load_config(small_config(tmp_path, collectors=collectors))
    assert said in str(caught.value)
