"""The benchmark's own collectors: attention, and an adapter fresh or given."""

import os
from pathlib import Path

import peft
import pytest
import torch
from support.bench_task import model_folder

from tokencredit.bench import cell, signals
from tokencredit.bench import entries as pipelines
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.problem import load_world
from tokencredit.bench.sampling import draw
from tokencredit.collect.adapter_residual import adapter_residuals
from tokencredit.errors import TokenCreditError
from tokencredit.lab.data import load_model
from tokencredit.methods.table import PRESETS

TASK = "support.bench_task:letters"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    folder = model_folder(tmp_path_factory.mktemp("model"))
    return BenchConfig(tasks=(TASK,), model=str(folder), prompts=4, rollouts=8, replicates=1, resamples=20)


def adapter_folder(config: BenchConfig, where: Path) -> Path:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)  # B is not zero
    assert config.model is not None
    peft.get_peft_model(load_model(config.model), lora).save_pretrained(where)
    for file in Path(config.model).glob("tokenizer*"):
        os.link(file, where / file.name)
    return where


def test_every_preset_without_a_teacher_has_a_line(config: BenchConfig) -> None:
    found, left_out = pipelines.entries((), controls=False, collectors=pipelines.FIELD_COLLECTORS)
    wanted = {name for name in PRESETS if name not in left_out}
    assert {entry.name for entry in found} == wanted
    assert all("teacher" in reason for reason in left_out.values())
    assert {"arca", "arca_released", "policy_divergence", "attention", "attention_illuminates", "atpo"} <= wanted
    sampled = draw(load_world(config, TASK, "given"), config, 0)
    for advantages in cell.assign_all(found, sampled, config, pipelines.FIELD_COLLECTORS):
        assert bool(torch.isfinite(advantages[sampled.batch.response_mask]).all())


def test_a_fresh_adapter_moves_by_one_step_of_the_policy_gradient(config: BenchConfig) -> None:
    world = load_world(config, TASK, "given")
    sampled = draw(world, config, 0)
    model = signals.adapted(world)
    moved = [value.detach().abs() for name, value in model.named_parameters() if "lora_B" in name]
    assert {round(float(value), 9) for tensor in moved for value in tensor.unique()} <= {0.0, signals.STEP}
    assert max(float(value.max()) for value in moved) == pytest.approx(signals.STEP)
    with torch.no_grad():
        before, after = (float(sum(signals._objectives(world, policy))) for policy in (world.model, model))
    assert after > before  # an ascent, on the responses it was taken from
    residuals = signals.residuals(sampled)[sampled.batch.response_mask]
    assert float(residuals.min()) > 0
    gap = (signals.reference(sampled) - sampled.batch.old_logprobs)[sampled.batch.response_mask]
    assert 0 < float(gap.abs().max()) < 0.5
    assert signals.doubling(sampled).unique().numel() == 1
    assert float(signals.doubling(sampled)[0]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_peft_folder_is_the_policy_with_its_adapter(config: BenchConfig, tmp_path: Path, dtype: str) -> None:
    given = config.replace(model=str(adapter_folder(config, tmp_path / "adapter")), dtype=dtype)
    world = load_world(given, TASK, "given")
    assert signals.adapted(world) is world.model
    sampled = draw(world, given, 0)  # checks exact values of the adapted policy against its verifier
    span = signals.span_of(world, sampled.batch.response_ids, sampled.batch.response_mask)
    torch.testing.assert_close(signals.residuals(sampled), adapter_residuals(world.model, *span)[0])
    base = load_world(config.replace(dtype=dtype), TASK, "given")
    assert not torch.allclose(world.credit.prompt_values, base.credit.prompt_values)
    gap = (signals.reference(sampled) - sampled.batch.old_logprobs)[sampled.batch.response_mask]
    assert float(gap.abs().max()) > 1e-3
    result = cell.run_cell(
        given.replace(pipelines=("grpo", "arca")),
        TASK,
        "given",
        tmp_path / "out",
        {},
        lambda: None,
    )
    assert [row["name"] for row in result["methods"]][:3] == ["grpo", "arca", "arca"]
    lora = sum(value.numel() for name, value in world.model.named_parameters() if "lora_" in name)
    assert result["model"]["parameters"] == lora


def test_an_adapter_without_a_base_is_refused(config: BenchConfig, tmp_path: Path) -> None:
    folder = adapter_folder(config, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(str(config.model), ""))
    with pytest.raises(TokenCreditError, match="does not say which model it belongs to"):
        load_world(config.replace(model=str(folder)), TASK, "given")
