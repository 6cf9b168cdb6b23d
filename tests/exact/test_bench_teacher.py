"""The benchmark with a teacher: who takes part, and how methods stand to the gradient of the teacher's objective."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_world import ALPHABET, model_folder

from tokencredit import TokenCreditError
from tokencredit.bench.cell import assign_all
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import FIELD_COLLECTORS, entries
from tokencredit.bench.problem import draw, load_world
from tokencredit.bench.run import run_bench
from tokencredit.bench.teacher import load_teacher, objective_of, teacher_collectors, teacher_success
from tokencredit.cli.bench import config_of, print_markdown, print_table
from tokencredit.cli.main import build_parser
from tokencredit.collect.teacher.prompts import better_attempts
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.report.bench_page import render_bench

TASK = "bench_world:letters"


def teacher_folder(where: Path) -> Path:
    """Another random model with the student's tokenizer."""
    tokenizer = build_tokenizer(ALPHABET)
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)  # far from uniform, so that it is far from the student
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(model_folder(root / "student")), str(teacher_folder(root / "teacher"))


@pytest.fixture(scope="module")
def config(folders: tuple[str, str]) -> BenchConfig:
    return BenchConfig(
        tasks=(TASK,), model=folders[0], prompts=4, rollouts=32, replicates=4, resamples=50, dtype="float64",
        pipelines=("grpo", "opd", "exopd", "iw_opd", "opsd", "dasd"), controls=False, baseline="opd",
        teacher={"kind": "model", "model": folders[1]}, teacher_samples=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(config: BenchConfig, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_bench(config, tmp_path_factory.mktemp("bench"))


def method(results: dict, name: str) -> dict:
    return next(m["figures"] for m in results["cells"][0]["methods"] if m["name"] == name and not m["matched"])


def test_opd_ascends_the_teachers_objective_and_grpo_does_not(results: dict) -> None:
    opd, grpo = method(results, "opd"), method(results, "grpo")
    assert opd["teacher_expected"][0] == pytest.approx(1.0, abs=0.03)  # unbiased: E A ∇ln π = −∇KL, state by state
    assert opd["teacher_direction"][0] > 0.9
    assert opd["teacher_sequence"][0] < opd["teacher_direction"][0]  # it drops what follows a token
    assert abs(grpo["teacher_direction"][0]) < 0.8
    assert opd["teacher_over_baseline"][0] == pytest.approx(0.0)
    assert method(results, "opsd") == opd
    # The reference of ExOPD is the student as it is: λ (ln ρ − ln π), a multiple of OPD.
    assert method(results, "exopd")["teacher_direction"] == pytest.approx(opd["teacher_direction"])
    assert method(results, "iw_opd")["teacher_direction"] != opd["teacher_direction"]


def test_what_the_cell_says_of_the_teacher(results: dict, config: BenchConfig) -> None:
    (cell,) = results["cells"]
    assert cell["teacher"]["section"] == {"kind": "model", "model": config.teacher["model"]}
    assert cell["teacher"]["covered"] == pytest.approx(1.0, abs=0.05)  # four tokens of five: nearly all states are seen
    assert cell["teacher"]["divergence"] > 0.1
    assert cell["success"]["exact"] != pytest.approx(cell["teacher"]["success"], abs=0.01)


def test_the_divergence_is_that_of_samples(config: BenchConfig) -> None:
    # J against the mean of Σ ln π − ln ρ over the sampled responses.
    world = load_world(config, TASK, "given")
    teacher = load_teacher(world, config, TASK)
    sampled = draw(world, replace(config, rollouts=200), 0)
    gap = teacher_collectors(teacher)["teacher_logprobs"](sampled) - sampled.batch.old_logprobs
    estimate = -torch.where(sampled.batch.response_mask, gap, 0.0).sum(1).view(4, -1)
    for prompt in range(4):
        error = float(estimate[prompt].std()) / 200**0.5
        assert objective_of(teacher, world, prompt).divergence == pytest.approx(
            float(estimate[prompt].mean()), abs=4 * error + 0.02
        )


def test_every_preset_of_the_family_takes_part(config: BenchConfig) -> None:
    world = load_world(config, TASK, "given")
    collectors = FIELD_COLLECTORS | teacher_collectors(load_teacher(world, config, TASK))
    found, left_out = entries((), controls=True, collectors=collectors)
    assert {name for name in PRESETS if "teacher_logprobs" in get_pipeline(name).requires} <= {
        entry.name for entry in found
    }
    _, without = entries((), controls=True, collectors=FIELD_COLLECTORS)
    assert left_out.keys() < without.keys()


def test_the_policy_under_a_privileged_prompt(config: BenchConfig) -> None:
    template = "{trace}{prompt}"
    given = replace(config, teacher={"kind": "self", "template": template}, prompts=3)
    world = load_world(given, TASK, "given")
    teacher = load_teacher(world, given, TASK)
    assert [row["trace"] in ("a", "ab", "aa") for row in teacher.rows] == [True] * 3
    before = objective_of(teacher, world, 0)
    assert before.divergence > 1e-6
    other = load_teacher(world, replace(given, teacher={"kind": "self", "template": "b{prompt}"}), TASK)
    assert objective_of(other, world, 0).divergence != before.divergence
    # A teacher with the student's own weights is as good as the student on the same prompt, whatever the field's name.
    plain = load_teacher(world, replace(given, teacher={"kind": "self", "weights": "frozen"}), TASK)
    assert objective_of(plain, world, 0).divergence == pytest.approx(0.0, abs=1e-12)
    assert teacher_success(plain, world) == pytest.approx(float(world.credit.prompt_values.mean()))


def test_a_teacher_changes_nothing_for_those_who_do_not_ask(config: BenchConfig) -> None:
    # Both read `ref_logprobs`: ExOPD's reference is the student as it is, the other's the model without its adapter.
    world = load_world(config, TASK, "given")
    sampled = draw(world, config, 0)
    taught = teacher_collectors(load_teacher(world, config, TASK))
    found, _ = entries(("policy_divergence", "exopd"), controls=False, collectors=FIELD_COLLECTORS | taught)
    given = assign_all(found, sampled, config, FIELD_COLLECTORS, taught)
    both = {(entry.name, entry.matched): value for entry, value in zip(found, given, strict=True)}
    alone = [entry for entry in found if entry.name == "policy_divergence"]
    without = assign_all(alone, sampled, config, FIELD_COLLECTORS)
    assert torch.equal(both["policy_divergence", False], without[0]) and float(without[0].abs().max()) > 0
    gap = taught["teacher_logprobs"](sampled) - sampled.batch.old_logprobs
    torch.testing.assert_close(both["exopd", False], torch.where(sampled.batch.response_mask, 1.25 * gap, 0.0).float())


def test_a_sibling_gives_credit_but_no_objective(config: BenchConfig, tmp_path: Path) -> None:
    given = replace(
        config, teacher={"kind": "self", "template": "{attempt}{prompt}"}, prompts=2, pipelines=("grpo", "sdpo")
    )
    (cell,) = run_bench(given, tmp_path)["cells"]
    assert cell["teacher"]["success"] is None and "divergence" not in cell["teacher"]
    assert "teacher_direction" not in cell["methods"][0]["figures"]
    print_table(cell)
    assert "Direction of the teacher" not in render_bench({"cells": [cell], "config": given.to_mapping()})


def test_better_attempts() -> None:
    # Group 0: mean 1/3, the second is above it; group 1 has one response; group 2 is of one outcome.
    texts, groups, rewards = list("abcdef"), [0, 0, 0, 1, 2, 2], [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert better_attempts(texts, groups, rewards) == ["b", None, "b", None, None, None]


def test_tables_and_page_show_the_objective(results: dict, capsys: pytest.CaptureFixture[str]) -> None:
    print_markdown(results["cells"][0])
    print_table(results["cells"][0])
    text = capsys.readouterr().out
    assert "teacher sequence" in text and "KL to it" in text
    page = render_bench(results)
    assert "Direction of the teacher's objective" in page


@pytest.mark.parametrize(
    ("flag", "section"),
    [
        ("late", {"kind": "model", "model": "tiny", "stage": "late"}),
        ("runs/x/model", {"kind": "model", "model": "runs/x/model"}),
        ("{kind: self, template: trace}", {"kind": "self", "template": "trace"}),
    ],
)
def test_the_flag(flag: str, section: dict) -> None:
    assert config_of(build_parser("bench").parse_args(["bench", "--teacher", flag])).teacher == section


def test_teachers_that_cannot_be(config: BenchConfig, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="`teacher` must be a mapping, got 'late'"):
        BenchConfig.from_mapping({"teacher": "late"})
    with pytest.raises(TokenCreditError, match="unknown teacher kind 'modle', did you mean 'model'"):
        run_bench(replace(config, teacher={"kind": "modle"}), tmp_path / "kind")
    with pytest.raises(TokenCreditError, match="no `hint` for the teacher's prompt"):
        run_bench(replace(config, teacher={"kind": "self", "template": "{hint}{prompt}"}), tmp_path / "hint")
    given = json.loads(json.dumps(config.to_mapping()))
    assert BenchConfig.from_mapping(given) == config
