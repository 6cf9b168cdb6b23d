"""The lab's tokenizer, model and warm start: format, determinism, and a cache that is complete or absent."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.errors import TokenCreditError
from tokencredit.lab import model as lab_model
from tokencredit.lab.cache import CARD, cached_folder
from tokencredit.lab.model import SIZES, STAGES, build_model, build_tokenizer, warm_start
from tokencredit.lab.success import success_probability
from tokencredit.lab.supervised import collate, fit
from tokencredit.lab.tasks import SPLITS, TASKS, chain_task, countdown_task, get_task
from tokencredit.lab.tasks.countdown import problem_of

FEW = {"steps": 2, "batch": 4}


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencredit.lab.supervised.POOL", 20)


@pytest.fixture(scope="module")
def trained() -> tuple:
    """A model that a few seconds of training on two problems brought to a middling success at them."""
    drawn = [problem_of(numbers, target) for numbers, target in (([1, 2], 3), ([3, 2], 1))]
    task = replace(countdown_task(numbers=2), draw=lambda seed: drawn[seed % 2])
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(SPLITS, "sft", (0, 100))
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer, layers=1, width=32, heads=2)
    fit(model, tokenizer, task, solved_share=0.6, steps=60, batch=16, learning_rate=1e-2, seed=0)
    monkeypatch.undo()
    return model, tokenizer, task, drawn


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tokenizer_is_exact_and_one_token_a_character(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    build_tokenizer(task.alphabet).save_pretrained(tmp_path)
    for tokenizer in (build_tokenizer(task.alphabet), AutoTokenizer.from_pretrained(tmp_path)):
        for problem in task.problems("test", 3):
            for text in (problem.prompt, task.accepted(problem)[0]):
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text) and tokenizer.decode(ids) == text
                assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_tokenizer_pads_on_the_left_and_adds_nothing() -> None:
    tokenizer = build_tokenizer("abc")  # <pad> 0, <eos> 1, a 2, b 3, c 4
    encoded = tokenizer(["abc", "b", ""], padding=True)
    assert encoded["input_ids"] == [[2, 3, 4], [0, 0, 3], [0, 0, 0]]
    assert encoded["attention_mask"] == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert tokenizer.bos_token is None and len(tokenizer) == 5


def test_tokenizer_refuses_what_it_cannot_spell() -> None:
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer("abc")("abx")
    with pytest.raises(TokenCreditError, match="distinct characters, at least one, got 'aba'"):
        build_tokenizer("aba")


@pytest.mark.parametrize("size", sorted(SIZES))
def test_models_stay_under_a_million_parameters(size: str) -> None:
    tokenizer = build_tokenizer(get_task("chain").alphabet)
    model = build_model(tokenizer, **SIZES[size]._asdict())
    assert 100_000 < model.num_parameters() < 1_000_000
    assert model.config.model_type == "qwen3"
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_weights_depend_on_the_seed_alone() -> None:
    tokenizer = build_tokenizer("ab")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(tokenizer, layers=1, width=16, heads=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (build_model(tokenizer, layers=1, width=16, heads=2, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(TokenCreditError, match="got width 20 and heads 3"):
        build_model(build_tokenizer("ab"), width=20, heads=3)


def test_loss_falls_on_response_and_eos_only() -> None:
    task = countdown_task(numbers=2)
    tokenizer, (problem,) = build_tokenizer(task.alphabet), task.problems("sft", 1)
    text = task.accepted(problem)[0]
    input_ids, response_mask = collate(tokenizer, [problem, problem], [text, "1"])
    assert tokenizer.decode(input_ids[0][response_mask[0]]) == text + tokenizer.eos_token
    assert tokenizer.decode(input_ids[1][response_mask[1]]) == "1" + tokenizer.eos_token
    assert tokenizer.decode(input_ids[0][~response_mask[0]]) == problem.prompt


def test_success_probability_agrees_with_sampling(trained: tuple) -> None:
    model, tokenizer, task, problems = trained
    exact = success_probability(model, tokenizer, task, problems)
    assert 0.1 < exact.mean() < 0.95  # else the comparison says little
    samples = 512
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = model.generate(**prompts, max_new_tokens=task.max_response, num_return_sequences=samples)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    for index, problem in enumerate(problems):
        mine = texts[index * samples : (index + 1) * samples]
        share = sum(task.verify(problem, text) for text in mine) / samples
        error = max(exact[index] * (1 - exact[index]), torch.tensor(0.01)) ** 0.5 / samples**0.5
        assert abs(share - exact[index]) < 4 * error


def test_warm_start_is_a_model_folder_with_a_card(tmp_path: Path) -> None:
    folder = warm_start("carry", cache_dir=tmp_path, **FEW)
    card = json.loads((folder / CARD).read_text())
    assert card["settings"]["task"] == "carry" and card["settings"]["solved_share"] == 0.3
    assert 0 <= card["test_success"] <= 1 and card["parameters"] < 1_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.float32
    assert [path for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_warm_start_is_built_once_and_depends_on_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCREDIT_CACHE", str(tmp_path))
    first = warm_start("carry", **FEW)
    other = warm_start("carry", seed=1, **FEW)
    assert other != first and first.parent == tmp_path
    monkeypatch.setattr(lab_model, "_build", lambda *_: pytest.fail("built again"))
    assert warm_start("carry", **FEW) == first


def test_warm_start_does_not_depend_on_the_global_generator(tmp_path: Path) -> None:
    weights = []
    for place, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        folder = warm_start("carry", cache_dir=tmp_path / place, **FEW)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("damage", ["truncate", "remove", "card"])
def test_a_damaged_folder_is_built_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = warm_start("carry", cache_dir=tmp_path, **FEW)
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(intact[:1000])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / CARD).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert warm_start("carry", cache_dir=tmp_path, **FEW) == folder
    assert "building it again" in caplog.text
    assert weights.read_bytes() == intact


def test_a_killed_build_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def killed(path: Path) -> dict:
        (path / "half").write_text("written")
        raise KeyboardInterrupt

    def whole(path: Path) -> dict:
        (path / "all").write_text("written")
        return {}

    with pytest.raises(KeyboardInterrupt):
        cached_folder(folder, {"a": 1}, killed)
    assert not folder.exists()
    cached_folder(folder, {"a": 1}, whole)
    assert {path.name for path in folder.iterdir()} == {"all", CARD}


def test_later_stages_go_on_from_earlier_ones(tmp_path: Path) -> None:
    late = warm_start("carry", stage="late", cache_dir=tmp_path, **FEW)
    folders = {path.name.split("-")[2]: path for path in tmp_path.iterdir() if path.is_dir()}
    assert set(folders) == set(STAGES) and folders["late"] == late
    weights = [(folders[stage] / "model.safetensors").read_bytes() for stage in STAGES]
    assert len(set(weights)) == 3


def test_a_task_with_an_easier_version_begins_there() -> None:
    task = chain_task()
    easy, long = lab_model._plan(task, 600, 32, "start", 0.3)
    assert easy[:4] == (task.easier, 600, 32, 0.3) and long[:4] == (task, 400, 16, 0.3)
    assert [phase[:3] for phase in lab_model._plan(task, 600, 32, "late", 0.95)] == [(task, 200, 16)]
    assert lab_model._plan(get_task("carry"), 600, 32, "middle", 0.6) == [(get_task("carry"), 300, 32, 0.6, 1.0)]


def test_countdown_learns_to_solve_before_it_learns_to_miss() -> None:
    task = get_task("countdown")
    first, second = lab_model._plan(task, 1000, 32, "start", 0.3)
    assert first == (task, 600, 32, 1.0, 1.0) and second == (task, 400, 32, 0.3, 0.5)
    assert lab_model._plan(task, 1000, 32, "middle", 0.6) == [(task, 500, 32, 0.6, 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "tinny"}, "unknown model size 'tinny', did you mean 'tiny'"),
        ({"stage": "end"}, "unknown stage 'end'"),
        ({"solved_share": 1.5}, r"`solved_share` must be in \[0, 1\], got 1.5"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match=message):
        warm_start("countdown", cache_dir=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
