"""Data sets, rewards and model folders as a trainer meets them."""

from pathlib import Path

import pytest

from tokencredit.collect.load import _looks_local
from tokencredit.errors import TokenCreditError
from tokencredit.lab.data import load_model, load_tokenizer, prompt_dataset, reward_function
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.tasks import TASKS, Problem, get_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer(get_task("countdown").alphabet)
    build_model(tokenizer, layers=1, width=16, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(TASKS))
def test_rows_are_the_problems_of_the_split(name: str) -> None:
    rows, problems = prompt_dataset(name, "train", 6, seed=2), get_task(name).problems("train", 6, seed=2)
    assert rows.column_names == ["prompt", "problem"]
    assert list(rows["prompt"]) == [problem.prompt for problem in problems]
    assert [Problem.from_json(text) for text in rows["problem"]] == problems


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(TokenCreditError, match="`count` must be at least 1, got 0"):
        prompt_dataset("carry", "train", 0)


def test_reward_is_the_verifier() -> None:
    task = get_task("countdown")
    (problem,) = task.problems("train", 1)
    right, column = task.accepted(problem)[0], [problem.to_json()] * 2
    reward = reward_function("countdown")
    assert reward.__name__ == "countdown_reward"
    assert reward(prompts=[problem.prompt] * 2, completions=[right, "1+1=2"], problem=column, extra=[0, 0]) == [
        1.0,
        0.0,
    ]


def test_reward_wants_the_characters_and_one_end_token() -> None:
    task = get_task("countdown")
    tokenizer, (problem,) = build_tokenizer(task.alphabet), task.problems("train", 1)
    right = task.accepted(problem)[0]
    ids, pad, eos = tokenizer(right)["input_ids"], tokenizer.pad_token_id, tokenizer.eos_token_id
    completion_ids = [[*ids, eos], ids, [*ids[:2], pad, *ids[2:], eos]]  # whole; cut off; padding token inside
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    assert texts == [right] * 3
    rewards = reward_function(task)(
        prompts=[problem.prompt] * 3,
        completions=texts,
        problem=[problem.to_json()] * 3,
        completion_ids=completion_ids,
    )
    assert rewards == [1.0, 0.0, 0.0]


def test_a_saved_model_loads(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.padding_side == "left"
    assert load_model(folder).config.vocab_size == len(tokenizer)


def one_line(error: pytest.ExceptionInfo[TokenCreditError]) -> str:
    assert "\n" not in error.value.message and error.value.hint
    return error.value.message


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_no_model_folder_is_named_and_never_looked_up(
    load: object, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(load)
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(empty)
    for missing in ("./nowhere", "a/b/c", "nowhere", str(empty / "nowhere")):
        with pytest.raises(TokenCreditError) as error:
            load(missing)
        assert "no model folder at" in one_line(error) and "nothing is there" in one_line(error)
    with pytest.raises(TokenCreditError) as error:
        load(empty)
    assert "is not a model folder" in one_line(error) and "(empty)" in one_line(error)
    with pytest.raises(TokenCreditError) as error:
        load(folder / "config.json")
    assert "it is a file" in one_line(error)


@pytest.mark.parametrize(
    ("load", "damaged"),
    [(load_model, "config.json"), (load_model, "model.safetensors"), (load_tokenizer, "tokenizer.json")],
)
def test_damaged_files_are_one_line(load: object, damaged: str, folder: Path) -> None:
    assert callable(load)
    (folder / damaged).write_bytes(b"{")
    with pytest.raises(TokenCreditError) as error:
        load(folder)
    assert one_line(error).startswith(f"cannot load '{folder}'")


def test_names_that_mean_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not _looks_local("owner/model")
    assert not _looks_local("gpt2")
    assert _looks_local("my-model")
    (tmp_path / "gpt2").mkdir()
    assert _looks_local("gpt2")  # a folder here comes first
