"""The benchmark end to end on a task of our own: figures, resumption, what is refused, the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.bench_task import Letters, model_folder

from tokencredit import TokenCreditError
from tokencredit.bench import cell
from tokencredit.bench import entries as pipelines
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.problem import load_task, load_world
from tokencredit.bench.run import run_bench
from tokencredit.bench.sampling import draw, sample_responses
from tokencredit.cli.bench import config_of, print_markdown, print_table
from tokencredit.cli.main import build_parser
from tokencredit.report.bench_page import render_bench


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def config(model: str) -> BenchConfig:
    return BenchConfig(
        tasks=("support.bench_task:letters",), model=model, prompts=6, rollouts=8, resamples=100, dtype="float64",
        pipelines=("grpo", "rloo", "phr", "psr", "hapo", "random_tokens", "exact"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(config: BenchConfig, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_bench(config, tmp_path_factory.mktemp("bench"))


def without_time(found: dict) -> dict:
    return {**found, "cells": [{**item, "seconds": 0} for item in found["cells"]]}


def method(results: dict, name: str, matched: bool = False) -> dict:
    rows = [item for item in results["cells"][0]["methods"] if (item["name"], item["matched"]) == (name, matched)]
    return rows[0]["figures"]


def test_all_figures_are_there_and_sane(results: dict) -> None:
    (found,) = results["cells"]
    assert found["capacity"]["bounds"]["violations"] == 0
    assert found["success"]["exact"] == pytest.approx(found["success"]["sampled"], abs=0.15)
    exact = method(results, "exact")
    assert exact["rank_correlation"][0] == pytest.approx(1.0)
    assert exact["sign_agreement"] == pytest.approx([1.0, 1.0, 1.0])
    for name in ("grpo", "exact", "psr"):
        for figure, (value, low, high) in method(results, name).items():
            assert value is not None, (name, figure)
            assert low <= high, (name, figure)
    # one random response is no better a credit than another: rloo is grpo up to the weight of a prompt
    assert method(results, "rloo")["rank_correlation"] != method(results, "phr")["rank_correlation"]
    assert method(results, "grpo")["direction_over_baseline"][0] == pytest.approx(0.0)
    assert method(results, "exact")["progress"][0] > 0
    assert len(found["states"]["H"]) == len(found["states"]["I"]) > 0


def test_float32_gives_the_figures_of_float64(config: BenchConfig, results: dict, tmp_path: Path) -> None:
    single = run_bench(config.replace(dtype="float32"), tmp_path)
    for name in config.pipelines:
        for figure in ("direction", "average_direction", "progress", "captured"):
            assert method(single, name)[figure] == pytest.approx(method(results, name)[figure], abs=2e-3), (
                name,
                figure,
            )


def test_small_memory_and_small_sketches_change_no_value(config: BenchConfig, results: dict, tmp_path: Path) -> None:
    # one pipeline at a time, and 500 numbers of each gradient: values are exact all the same, intervals are close
    small = run_bench(config.replace(memory_mib=1, sketch=500), tmp_path)
    assert len(list(tmp_path.glob("*/part-*.safetensors"))) > 1
    for name in config.pipelines:
        value, low, high = method(small, name)["direction"]
        other = method(results, name)["direction"]
        assert value == pytest.approx(other[0], abs=1e-6)
        assert (low, high) == pytest.approx(other[1:], abs=0.08)


def test_a_killed_benchmark_goes_on_to_the_same_result(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(memory_mib=1, sketch=1500, pipelines=("grpo", "psr", "exact"), controls=False)
    whole = run_bench(config, tmp_path / "whole")
    measure, calls = cell.measure, []

    def dies_at_the_second_part(*given: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(cell, "measure", dies_at_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        run_bench(config, tmp_path / "killed")
    kept = len(list((tmp_path / "killed").glob("*/part-*.safetensors")))
    assert kept == 1
    resumed = run_bench(config, tmp_path / "killed")
    assert without_time(resumed) == without_time(whole)
    before = len(calls)
    run_bench(config, tmp_path / "killed")
    assert len(calls) == before  # finished cells are read, not measured
    with pytest.raises(TokenCreditError, match="holds a benchmark with prompts = 6, asked for is 5"):
        run_bench(config.replace(prompts=5), tmp_path / "killed")


def test_presets_without_their_fields_are_named_and_a_collector_lets_them_in(config: BenchConfig) -> None:
    found, left_out = pipelines.entries(("grpo", "arca"), controls=False, collectors={})
    assert [entry.name for entry in found] == ["grpo"]
    assert "adapter_residuals" in left_out["arca"]

    def residuals(sampled: object) -> torch.Tensor:
        batch = sampled.batch  # type: ignore[attr-defined]
        return batch.entropies.float()

    table = {"adapter_residuals": residuals}
    found, left_out = pipelines.entries(("grpo", "arca"), controls=False, collectors=table)
    assert [(entry.name, entry.matched) for entry in found] == [("grpo", False), ("arca", False), ("arca", True)]
    world = load_world(config, "support.bench_task:letters", "given")
    assert len(cell.assign_all(found, draw(world, config, 0), config, table)) == 3


def test_replicates_differ_and_repeat(config: BenchConfig) -> None:
    world = load_world(config, "support.bench_task:letters", "given")
    first, again, other = (draw(world, config, k).batch.response_ids for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generate_samples_what_the_fast_sampler_samples(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokencredit.lab import sampler

    world = load_world(config.replace(prompts=2), "support.bench_task:letters", "given")
    monkeypatch.setattr(sampler, "unsupported", lambda model: "another kind")
    ids, mask = sample_responses(world, 400, "test")
    first = (ids[:400, 0] == world.tokenizer.eos_token_id).double().mean()
    with torch.no_grad():
        logits = world.model(input_ids=torch.tensor([world.prompts[0]])).logits[0, -1]
    expected = float(logits.softmax(-1)[world.tokenizer.eos_token_id])
    assert float(first) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 400) ** 0.5)
    assert bool(mask[:, 0].all())
    assert int(mask.sum(1).max()) <= world.task.max_response


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("support.bench_task:too_kind", "the verifier and the list disagree: response"),
        ("support.bench_task:too_long", "`max_response` is 4"),
        ("support.bench_task:nothing", "cannot load the task"),
        ("support.bench_task:ALPHABET", "has no `problems`"),
        ("countdwn", "did you mean 'countdown'"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused(
    config: BenchConfig, tmp_path: Path, task: str, message: str
) -> None:
    with pytest.raises(TokenCreditError, match=message):
        run_bench(config.replace(tasks=(task,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # else the corrected command would find another config there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipelines": ("hapoo",)}, "did you mean 'hapo'"),
        ({"model": None, "stages": ("start", "lat")}, "unknown stage 'lat', did you mean 'late'"),
        ({"teacher": {"kind": "selff"}}, "did you mean 'self'"),
        ({"tasks": ("support.bench_task:Letters", "cary")}, "did you mean 'carry'"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(
    config: BenchConfig, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(TokenCreditError, match=message):
        run_bench(config.replace(**change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"promts": 3}, "unknown key of a bench config 'promts', did you mean 'prompts'"),
        ({"prompts": 0}, "`prompts` must be a whole number of at least 1 and of at most 1,000,000, got 0"),
        ({"prompts": "many"}, "`prompts` must be a whole number .*, got 'many'"),
        ({"rollouts": 1}, "`rollouts` must be a whole number of at least 2"),
        ({"level": 1.5}, "`level` must be a number above 0 and below 1, got 1.5"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"tasks": []}, "`tasks` must be a name or a list of names"),
    ],
)
def test_bad_configs_are_refused(given: dict, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        BenchConfig.read(given)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text("prompts: 5\nrollouts: 4\ntasks: carry\n")
    arguments = build_parser("bench").parse_args(
        ["bench", str(path), "--prompts", "7", "--stage", "all", "--task", "all"]
    )
    config = config_of(arguments)
    assert (config.prompts, config.rollouts) == (7, 4)
    assert config.tasks == ("countdown", "carry", "chain")
    assert config.stages == ("start", "middle", "late")
    path.write_text("- a\n")
    with pytest.raises(TokenCreditError, match="must hold a mapping, got list"):
        config_of(arguments)


def test_a_class_of_tasks_is_made() -> None:
    assert isinstance(load_task("support.bench_task:Letters"), Letters)


def test_tables_rank_and_show_intervals(results: dict, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(results["cells"][0])
    print_markdown(results["cells"][0])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ") and "[" in line]
    values = [float(re.findall(r"-?\d\.\d+", row)[0]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert len(rows) == len({item["name"] for item in results["cells"][0]["methods"]})


class Balanced(HTMLParser):
    """Collects the tags that are still open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.scripts += tag == "script"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_offline_and_escaped(results: dict) -> None:
    evil = json.loads(json.dumps(results))
    example = evil["cells"][0]["examples"][0]
    example["prompt"], example["tokens"][0] = "<script>alert(1)</script>", '"><script>x</script>'
    cell = evil["cells"][0]
    cell["methods"][0]["name"], cell["task"] = "$x^{ \x1b[31m", "\x1b]0;title\x07"
    cell["left_out"] = {"\x1b[2J": "\x1b[1m"}
    text = render_bench(evil)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "Content-Security-Policy" in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.scripts == 0
    assert "&lt;script&gt;alert(1)" in text
    # nothing is fetched: the only addresses are the names of the SVG and metadata vocabularies
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    assert text.count("<svg") == 2
