"""Data sets and rewards of a run: every kind that is read, and one line for what cannot be."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokencredit.errors import TokenCreditError
from tokencredit.lab.data import load_model, load_tokenizer
from tokencredit.runs.config.run_config import DatasetSettings
from tokencredit.runs.data.datasets import load_evaluation, load_training, rows_to_dataset, without_overlap
from tokencredit.runs.data.material import load_material
from tokencredit.runs.data.prompts import check_kinds, check_lengths, choose_wrapping, wrap
from tokencredit.runs.data.rewards import check_columns, load_reward, on_plain_text

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def section(path: Any, **changes: Any) -> DatasetSettings:
    return DatasetSettings.read({"path": str(path)} | changes)


def refused(path: Any, **changes: Any) -> str:
    with pytest.raises(TokenCreditError) as caught:
        load_training(section(path, **changes))
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines(*ROWS)),
        ("rows.ndjson", lines(*ROWS)),
        ("lines.json", lines(*ROWS)),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("array.jsonl", json.dumps(ROWS)),
        ("bom.jsonl", "\ufeff" + lines(*ROWS)),
        ("blank.jsonl", "\n" + lines(ROWS[0]) + "\n\n" + lines(ROWS[1])),
        ("crlf.jsonl", lines(*ROWS).replace("\n", "\r\n")),
        ("rows.csv", 'prompt,answer\n1+1=,"2"\n2+2=,4\n'),
        ("bom.csv", "\ufeffprompt,answer\n1+1=,2\n2+2=,4\n"),
        ("rows.tsv", "prompt\tanswer\n1+1=\t2\n2+2=\t4\n"),
    ],
)
def test_files_of_rows(name: str, content: str, tmp_path: Path) -> None:
    found = load_training(section(write(tmp_path / name, content)))
    assert found["prompt"][:] == ["1+1=", "2+2="]
    assert [str(value) for value in found["answer"]] == ["2", "4"]


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "both"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved", tmp_path / "both", arrow):
        assert load_training(section(path))["prompt"][:] == ["1+1=", "2+2="]
    assert load_training(section(tmp_path / "both", split="test"))["prompt"][:] == ["2+2="]
    assert "has no split 'dev'; it has train, test" in refused(tmp_path / "both", split="dev")


def test_text_stays_text_and_missing_columns_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "dates.jsonl", lines({"prompt": "2020-01-01"}, {"prompt": "2021-02-03", "extra": 5}))
    found = load_training(section(path))
    assert found["prompt"][:] == ["2020-01-01", "2021-02-03"]
    assert found["extra"][:] == [None, 5]


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n{"prom', "line 2 is not JSON"),
        ('{"prompt": "a"}\n[1, 2]\n', "line 2 must be an object of columns, got list"),
        ('{"prompt": "a"}\n{}\n', "line 2 must be an object of columns, got an empty object"),
        ("[1, 2]", "row 0 must be an object of columns, got int"),
        ("3\n", "line 1 must be an object of columns, got int"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2 is not UTF-8"),
        (b'[{"prompt": "a"},\n\n{"prompt": "\xe4"}]', "line 3 is not UTF-8"),
        ("a\0b".encode("utf-16"), "line 1 is not UTF-8"),
        ('{"prompt": "a"}\n{"prompt": "b", "meta": ' + DEEP + "}\n", "line 2 is nested more than 64 levels deep"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ('{"prompt": "a", "n": ' + "9" * 30 + "}", "column 'n', row 0"),
        (lines({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "two"}), "column 'answer', row 1: 'two'"),
        (lines({"prompt": "a"}, {"prompt": [1]}), "column 'prompt', row 1"),
        ('{"prompt": "\\ud800"}\n', "column 'prompt', row 0"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("[]", "is empty"),
    ],
    ids=str,
)
def test_a_damaged_json_file_is_named_with_its_line(content: str | bytes, said: str, tmp_path: Path) -> None:
    told = refused(write(tmp_path / "rows.jsonl", content))
    assert said in told
    assert "rows.jsonl" in told
    assert len(told) < 600


def test_other_damaged_files(tmp_path: Path) -> None:
    Dataset.from_list(ROWS * 50).to_parquet(str(tmp_path / "rows.parquet"))
    whole = (tmp_path / "rows.parquet").read_bytes()
    assert "cannot read the dataset" in refused(write(tmp_path / "cut.parquet", whole[: len(whole) // 2]))
    assert "cannot read the dataset" in refused(write(tmp_path / "junk.arrow", b"\x00" * 64))
    assert "line 2 is not UTF-8" in refused(write(tmp_path / "rows.csv", b"prompt\n\xff\xfe\n"))
    assert "cannot read the dataset" in refused(write(tmp_path / "ragged.csv", "prompt\na\nb,c,d\n"))
    assert "is empty" in refused(write(tmp_path / "head.csv", "prompt,answer\n"))
    assert "none of the suffixes" in refused(write(tmp_path / "rows.txt", "a"))
    assert "no dataset file" in refused(tmp_path / "missing.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot read the dataset" in refused(tmp_path / "folder.jsonl")


def test_a_configuration_of_a_data_set_with_several(tmp_path: Path) -> None:
    """A local copy of a hub data set: the README of its folder lists two configurations."""
    folder = tmp_path / "copy"
    for name in ("main", "other"):
        (folder / name).mkdir(parents=True)
        write(folder / name / "train.jsonl", lines({"question": f"{name} train"}))
        write(folder / name / "test.jsonl", lines({"question": f"{name} test"}))
    listed = [
        {
            "config_name": name,
            "data_files": [
                {"split": "train", "path": f"{name}/train.jsonl"},
                {"split": "test", "path": f"{name}/test.jsonl"},
            ],
        }
        for name in ("main", "other")
    ]
    write(folder / "README.md", "---\nconfigs: " + json.dumps(listed) + "\n---\n")
    given = section(folder, prompt="question", config="main")
    assert load_training(given)["prompt"][:] == ["main train"]
    held_out = load_evaluation(given.replace(evaluation_split="test"))
    assert held_out is not None and held_out["prompt"][:] == ["main test"]
    told = refused(folder, prompt="question")
    assert "dataset: {config: …}" in told and "main" in told


# -- columns and prompts -----------------------------------------------------------------------------------------------


def test_the_column_of_the_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines({"question": "q", "prompt": "p", "original_prompt": "o"}))
    found = load_training(section(path, prompt="question"))
    assert found[0] == {"prompt": "q", "original_prompt_": "p", "original_prompt": "o"}
    assert "has no column 'text'; it has question, prompt" in refused(path, prompt="text")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a", None], "row 1 of the training data has the prompt None"),
        ([1.5, 2.5], "row 0 of the training data has the prompt 1.5"),
        (["a", "  "], "row 1 of the training data has an empty prompt"),
        ([["a"]], "row 0 of the training data has the message 'a'; it needs `role` and `content`"),
        ([[{"from": "human", "value": "x"}]], "it needs `role` and `content`"),
        ([[]], "row 0 of the training data has the prompt []"),
    ],
)
def test_prompts_that_are_none(prompts: list, said: str) -> None:
    with pytest.raises(TokenCreditError) as caught:
        check_kinds(Dataset.from_dict({"prompt": prompts}))
    assert said in str(caught.value)


def test_missing_values_of_a_csv_are_named_by_row(tmp_path: Path) -> None:
    rows = load_training(section(write(tmp_path / "rows.csv", "prompt,answer\n1+1=,2\n,3\n")))
    with pytest.raises(TokenCreditError, match="row 1 of the training data has the prompt None"):
        check_kinds(rows)


def test_a_character_without_a_token_is_named_with_its_row(model_folder: Path) -> None:
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder)
    rows = Dataset.from_dict({"prompt": ["1+1=", "2×2="]})
    with pytest.raises(TokenCreditError, match=r"row 1 of the training data: .* character '×' \(U\+00D7\)"):
        check_lengths(rows, tokenizer, model, 4, {})


@pytest.fixture
def instruct(model_folder: Path) -> Any:
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    return tokenizer


def test_plain_texts_become_user_turns_of_an_instruct_model(instruct: Any, model_folder: Path) -> None:
    rows = Dataset.from_list([{"prompt": "1+1", "answer": "2"}])
    auto = choose_wrapping(rows, instruct, DatasetSettings.read({}))
    assert auto.wraps and "user turn" in auto.notes[0]
    assert wrap(rows, auto)[0] == {"prompt": [{"content": "1+1", "role": "user"}], "answer": "2"}
    told = choose_wrapping(rows, instruct, DatasetSettings.read({"system_prompt": "Add."}))
    assert [turn["role"] for turn in wrap(rows, told)[0]["prompt"]] == ["system", "user"]
    assert wrap(rows, choose_wrapping(rows, instruct, DatasetSettings.read({"chat": False})))[0] == rows[0]
    base = load_tokenizer(model_folder)
    assert not choose_wrapping(rows, base, DatasetSettings.read({})).wraps
    for given_, said in (
        ({"chat": True}, "needs a chat template"),
        ({"system_prompt": "Add."}, "needs chat messages"),
    ):
        with pytest.raises(TokenCreditError, match=said):
            choose_wrapping(rows, base, DatasetSettings.read(given_))


def test_messages_keep_their_own_system_turn(instruct: Any) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "1"}]
    rows = Dataset.from_dict({"prompt": [own, [{"role": "user", "content": "2"}]]})
    found = wrap(rows, choose_wrapping(rows, instruct, DatasetSettings.read({"system_prompt": "yours"})))["prompt"]
    assert [turns[0]["content"] for turns in found] == ["mine", "yours"]
    with pytest.raises(TokenCreditError, match="needs plain texts"):
        choose_wrapping(rows, instruct, DatasetSettings.read({"chat": False}))


# -- evaluation data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    parts = {
        name: Dataset.from_dict({"prompt": [f"{name} {n}" for n in range(3)]}) for name in ("train", "test", "dev")
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    return tmp_path / "splits"


def test_an_evaluation_is_never_the_training_split(splits: Path, tmp_path: Path) -> None:
    def first(**changes: Any) -> str:
        found = load_evaluation(section(**({"path": splits} | changes)))
        assert found is not None
        return found[0]["prompt"]

    assert load_evaluation(section(splits)) is None
    assert first(evaluation_split="dev") == "dev 0"
    other = write(tmp_path / "rows.jsonl", lines(*ROWS))
    assert first(path=other, evaluation=str(splits)) == "test 0"  # by the usual name, not by that of training
    assert first(path=other, evaluation=str(splits), evaluation_split="train") == "train 0"
    for changes in ({"evaluation": str(splits)}, {"evaluation_split": "train"}):
        with pytest.raises(TokenCreditError, match="would use the training data"):
            load_evaluation(section(splits, **changes))
    with pytest.raises(TokenCreditError, match="one file and has no split 'test'"):
        load_evaluation(section(other, evaluation_split="test"))
    odd = DatasetDict(train=Dataset.from_list(ROWS), hard=Dataset.from_list(ROWS))
    odd.save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(TokenCreditError, match="several splits: train, hard"):
        load_evaluation(section(other, evaluation=str(tmp_path / "odd")))


def test_overlap_with_the_training_data() -> None:
    def prompts(count: int) -> Dataset:
        return Dataset.from_dict({"prompt": [f"Problem {n}" for n in range(count)]})

    found, left_out = without_overlap(prompts(40), ["  problem\n7 ", "other"])
    assert (len(found), left_out) == (39, 1)
    assert "Problem 7" not in found["prompt"]
    with pytest.raises(
        TokenCreditError, match="3 of 40 evaluation problems are also training prompts, the first in row 2"
    ):
        without_overlap(prompts(40), ["PROBLEM 2", "Problem 3", "Problem 4"])
    chat = Dataset.from_dict(
        {"prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": "Problem 1"}]]}
    )
    with pytest.raises(TokenCreditError, match="1 of 1 evaluation problems"):
        without_overlap(chat, ["Problem 1"])


# -- rewards -----------------------------------------------------------------------------------------------------------


def length_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def reward_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = write(
        tmp_path / "rewards_of_this_test.py", "def f(completions, **_):\n    return [1.0] * len(completions)\nx = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop("rewards_of_this_test", None)


def test_rewards_are_found_in_the_current_folder_and_by_file(reward_file: Path) -> None:
    for name in ("rewards_of_this_test:f", "./rewards_of_this_test.py:f", f"{reward_file}:f"):
        assert load_reward(name)(completions=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewards_of_this_test:missing", "cannot load the reward"),
        ("rewards_of_this_test:x", "is not a function"),
        ("./absent.py:f", "no file"),
        ("./rewards_of_this_test.py:missing", "has no 'missing'"),
        ("no_such_module:f", "cannot load the reward"),
        ("word", "module:function or a reward model"),
    ],
)
def test_rewards_that_cannot_be_loaded(name: str, said: str, reward_file: Path) -> None:
    with pytest.raises(TokenCreditError, match=said):
        load_reward(name)


def test_a_reward_model_is_a_folder_or_a_name(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = Qwen3Config(vocab_size=9, num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=0, **shape)
    Qwen3ForSequenceClassification(small).save_pretrained(tmp_path / "judge")
    assert load_reward(str(tmp_path / "judge")).config.num_labels == 1
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TokenCreditError, match="cannot load the reward model"):
        load_reward(str(tmp_path / "nothing"))


def test_a_reward_that_needs_a_missing_column_is_refused() -> None:
    check_columns([length_reward], ["prompt", "answer"], "training")
    with pytest.raises(TokenCreditError, match="'length_reward' needs the column 'answer', and the evaluation data"):
        check_columns([length_reward], ["prompt", "solution"], "evaluation")


def test_wrapped_data_give_their_rewards_plain_texts() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list, completions: list, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1.0]

    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}]
    wrapped = on_plain_text(reward)
    assert wrapped(prompts=[turns], completions=[[{"role": "assistant", "content": "2"}]], answer=["2"]) == [1.0]
    assert seen == {"prompts": ["1+1"], "completions": ["2"], "answer": ["2"]}
    assert wrapped.__name__ == "reward"


def test_material_of_a_data_set(model_folder: Path, reward_file: Path) -> None:
    from tokencredit.runs.config.load import load_config

    train = write(reward_file.parent / "train.jsonl", lines(*({"prompt": f"{n}+1="} for n in range(40))))
    held_out = write(reward_file.parent / "held_out.jsonl", lines(*({"prompt": f"{n}-1="} for n in range(30))))
    config = load_config(
        {
            "dataset": {"path": str(train), "evaluation": str(held_out)},
            "model": str(model_folder),
            "reward": {"rewards_of_this_test:f": 2.0, "./rewards_of_this_test.py:f": 1.0},
            "evaluation": {"problems": 7},
            "trainer": {"max_completion_length": 8},
        }
    )
    found = load_material(config)
    assert found.reward_weights == [2.0, 1.0] and len(found.rewards) == 2
    assert found.evaluation is not None and len(found.evaluation) == 7
    copied = str(write(reward_file.parent / "copy.jsonl", lines({"prompt": "3+1="})))
    config = config.replace(dataset=config.dataset.replace(evaluation=copied))
    with pytest.raises(TokenCreditError, match="1 of 1 evaluation problems are also training prompts"):
        load_material(config)


# -- whatever a file holds ---------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
TABLES = st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "x"]), VALUES, max_size=3), max_size=5)
QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(path: Path) -> None:
    try:
        rows = load_training(section(path))
        check_kinds(rows)
        assert all(isinstance(prompt, str | list) for prompt in rows["prompt"])
    except TokenCreditError as error:
        assert "\n" not in error.message


@QUICK
@given(rows=TABLES)
def test_any_json_rows_are_read_or_refused(rows: list, tmp_path: Path) -> None:
    read_or_refuse(write(tmp_path / "rows.jsonl", lines(*rows)))


@QUICK
@given(content=st.binary(max_size=200), where=st.integers(0, 60), name=st.sampled_from(["rows.jsonl", "rows.csv"]))
def test_any_bytes_are_read_or_refused(content: bytes, where: int, name: str, tmp_path: Path) -> None:
    good = (lines(*ROWS) if name == "rows.jsonl" else "prompt,answer\n1+1=,2\n2+2=,4\n").encode()
    read_or_refuse(write(tmp_path / name, good[:where] + content + good[where:]))


@QUICK
@given(rows=TABLES)
def test_any_rows_form_a_data_set_or_are_refused(rows: list) -> None:
    try:
        assert len(rows_to_dataset([row for row in rows if row], "rows")) <= len(rows)
    except TokenCreditError as error:
        assert "\n" not in error.message
