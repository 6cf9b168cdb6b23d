"""Records of any origin: what a pool can hold is kept and written back, what it cannot is refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.export import FORMATS, export_subset
from tokencredit.recipes.pool.formats import Refusal, is_trained, to_sample
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.pool.samples import INDEX, POOL, load_pool
from tokencredit.recipes.signals.relevance import read_queries

FIRST = np.array([0], np.int32)
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
CALL = [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]


def roles_and_texts(record: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in to_sample(record, "file")["messages"]]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": HI, "system": "s"}, "system s user hi assistant yes"),
        ({"conversations": HI, "system_prompt": "s"}, "system s user hi assistant yes"),
        (
            {"messages": [{"role": "system", "content": "s"}, *HI], "system": "s"},
            "system s user hi assistant yes",
        ),
        (
            {"instruction": "more", "input": "x", "output": "b", "history": [["a?", "a"]], "system": "s"},
            "system s user a? assistant a user more\n\nx assistant b",
        ),
        ({"prompt": "q", "response": "b", "history": HI}, "user hi assistant yes user q assistant b"),
        ({"prompt": HI[:1], "completion": HI[1:]}, "user hi assistant yes"),
        ({"task": "t", "prompt": "q", "answer": "a"}, "user q assistant a"),
    ],
)
def test_every_round_is_kept(record: dict, expected: str) -> None:
    assert " ".join(part for pair in roles_and_texts(record) for part in pair) == expected


def test_what_templates_read_is_kept_and_exported(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": CALL, "reasoning_content": "r", "weight": 0},
        {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "w"},
        {"role": "assistant", "content": "it is", "thinking": "t", "train": True, "model": "m"},
    ]
    record = {"messages": talk, "tools": json.dumps([{"name": "w"}]), "rank": [1, {"a": None}]}
    (tmp_path / "raw.jsonl").write_text(json.dumps(record) + "\n")
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    sample = next(pool.samples())
    assert sample["messages"][1] == {**talk[1], "content": ""}
    assert sample["messages"][3] == {key: talk[3][key] for key in ("role", "content", "thinking", "train")}
    assert sample["tools"] == [{"name": "w"}]
    assert sample["meta"] == {"rank": [1, {"a": None}], "turns": [{}, {}, {}, {"model": "m"}]}
    assert [is_trained(message) for message in talk] == [True, False, True, True]
    for name in ("jsonl", "trl"):
        export_subset(pool, FIRST, tmp_path / name, name)
        line = json.loads((tmp_path / name / "train.jsonl").read_text())
        assert line["messages"] == sample["messages"] and line["tools"] == sample["tools"]
    with pytest.raises(TokenCreditError, match="this format cannot express"):
        export_subset(pool, FIRST, tmp_path / "l", "llamafactory")
    export_subset(pool, FIRST, tmp_path / "a", "axolotl")
    trained = [m["training"] for m in json.loads((tmp_path / "a" / "train.jsonl").read_text())["messages"]]
    assert trained == [False, False, False, True] and "training" in (tmp_path / "a" / "axolotl.yaml").read_text()


def test_what_changes_the_text_changes_the_id(tmp_path: Path) -> None:
    records = [
        {"messages": HI},
        {"messages": HI, "tools": [{"name": "w"}]},
        {"messages": [HI[0], {**HI[1], "reasoning_content": "r"}]},
        {"messages": [*HI, *HI[:1], {**HI[1], "weight": 0}]},
        {"messages": [*HI, *HI]},
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    assert len(set(pool.text64.tolist())) == len(records)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": HI, "images": ["a.png"]}, "`images`"),
        ({"messages": [{**HI[0], "audio": "x.wav"}, HI[1]]}, "`audio`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, HI[1]]}, "a part of type 'image'"),
        ({"messages": HI, "history": [["a", "b"]]}, "`history` beside `messages`"),
        ({"messages": [{"role": "system", "content": "s"}, *HI], "system": "t"}, "another system prompt"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "`weight` must be 0 or 1"),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "no answer to train on"),
        ({"messages": [HI[0], {**HI[1], "function_call": {"name": "f"}}]}, "`function_call`"),
        ({"messages": [HI[0], {**HI[1], "tool_calls": "x"}]}, "`tool_calls` must be a list"),
        ({"messages": HI, "tools": "not json"}, "`tools` is a text that is not JSON"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role"),
        ({"messages": HI, "conversations": HI}, "which one is meant"),
        ({"prompt": "q", "response": "a", "history": "earlier"}, "`history` must be a list"),
        ({"messages": HI, "source": "\ud800"}, "not valid Unicode"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(record: dict, named: str) -> None:
    with pytest.raises(Refusal, match=r".") as caught:
        to_sample(record, "file")
    assert named in str(caught.value)


ALPACA = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(3)]
BOM = "\ufeff"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ALPACA, indent=2),
        BOM + json.dumps(ALPACA),
        "\n\n" + "\n".join(map(json.dumps, ALPACA)),
        BOM + "\r\n".join(map(json.dumps, ALPACA)),
        "".join(map(json.dumps, ALPACA)),
        "\n".join(json.dumps(record, indent=1) for record in ALPACA),
    ],
)
def test_a_json_file_is_read_by_what_it_holds(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    pool, rejected = canonicalise([path], tmp_path / "pool")
    assert (len(pool), rejected) == (3, [])
    assert len(read_queries(path, "t")) == 3


def test_a_broken_array_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(ALPACA, indent=2)[:-9])
    with pytest.raises(TokenCreditError, match="is a JSON array that cannot be read"):
        canonicalise([tmp_path / "data.json"], tmp_path / "pool", skip_bad=True)


DAMAGED = [
    b"\xff\xfe{}",
    b"[" * 200_000,
    b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    b'{"prompt": "q", "response": "a", "n": ' + b"9" * 5000 + b"}",
    json.dumps({"messages": [{"role": ["user"], "content": "q"}]}).encode(),
    json.dumps({"prompt": "q", "response": "a", "deep": json.loads("[" * 300 + "]" * 300)}).encode(),
    b'{"prompt": "q", "response": "a", "source": "\\ud800"}',
    b'"text"',
    b"null",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_counted(tmp_path: Path, line: bytes) -> None:
    good = [json.dumps(record).encode() for record in ALPACA]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([good[0], line, *good[1:]]))
    pool, rejected = canonicalise([tmp_path / "data.jsonl"], tmp_path / "pool", skip_bad=True)
    assert len(pool) == 3 and [item.line for item in rejected] == [2]
    with pytest.raises(TokenCreditError, match=r"data\.jsonl:2: "):
        canonicalise([tmp_path / "data.jsonl"], tmp_path / "pool")
    assert load_pool(tmp_path / "pool").hash == pool.hash  # the pool that was there stays
    assert not list((tmp_path / "pool").glob("*.partial"))


def test_a_lone_surrogate_is_kept_and_written_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "q", "response": "a \\ud83d"}\n')
    pool, _ = canonicalise([tmp_path / "data.jsonl"], tmp_path / "pool")
    for name in FORMATS:
        export_subset(pool, FIRST, tmp_path / name, name)
    assert json.loads((tmp_path / "jsonl" / "train.jsonl").read_bytes())["messages"][1]["content"] == "a \ud83d"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ALPACA * 500), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TokenCreditError, match=r"cannot read .*data\.parquet"):
        canonicalise([path], tmp_path / "pool")
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(TokenCreditError, match=r"state\.json is not what `datasets` writes"):
        canonicalise([tmp_path], tmp_path / "pool")
    (tmp_path / "good.jsonl").write_text(json.dumps(ALPACA[0]))
    canonicalise([tmp_path / "good.jsonl"], tmp_path / "pool")
    index = (tmp_path / "pool" / INDEX).read_bytes()
    for content in (index[: len(index) // 2], b"", b"\0" * len(index), index[:-300]):
        (tmp_path / "pool" / INDEX).write_bytes(content)
        with pytest.raises(TokenCreditError, match="build the pool again"):
            load_pool(tmp_path / "pool")
    (tmp_path / "pool" / INDEX).write_bytes(index)
    text = (tmp_path / "pool" / POOL).read_bytes()
    (tmp_path / "pool" / POOL).write_bytes(b"\0" * len(text))
    with pytest.raises(TokenCreditError, match="build the pool again"):
        list(load_pool(tmp_path / "pool").samples())


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(ALPACA[0]))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TokenCreditError, match="cannot create the folder"):
            canonicalise([tmp_path / "data.jsonl"], out)


NAMES = ("messages", "conversations", "prompt", "response", "instruction", "output", "history", "system", "tools")
NAMES += ("role", "from", "content", "value", "tool_calls", "weight", "source", "meta", "images", "text")
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["user", "gpt", "assistant", "system", "hi"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "gpt", "system", "tool"]) | VALUES, "content": LEAVES | VALUES},
    optional={"tool_calls": VALUES, "weight": VALUES, "train": VALUES, "name": VALUES},
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.text(max_size=8), "response": st.text(st.characters(), min_size=1, max_size=8)},
    optional={
        "history": VALUES,
        "tools": VALUES,
        "system": VALUES,
        "extra": VALUES,
        "source": LEAVES,
        "images": VALUES,
    },
)
RECORD = GOOD | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(NAMES, VALUES) | {"messages": st.lists(TURN, max_size=4) | VALUES}
)


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


LINES = st.lists(
    RECORD.map(written)
    | VALUES.map(written)
    | st.binary(max_size=40)
    | st.tuples(RECORD.map(written), st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]]),
    max_size=5,
)


def read_anything(lines: list[bytes], folder: Path) -> None:
    """A pool or one error; a pool can be loaded, read and exported."""
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    try:
        pool, rejected = canonicalise([folder / "data.jsonl"], folder / "pool", skip_bad=True)
    except TokenCreditError as error:
        assert "\n" not in error.message
        return
    assert all(item.reason for item in rejected)
    again = load_pool(folder / "pool")
    assert again.hash == pool.hash and len(list(again.samples())) == len(pool)
    export_subset(again, np.arange(len(again), dtype=np.int32), folder / "out", "trl")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_any_lines_give_a_pool_or_an_error(lines: list[bytes], tmp_path: Path) -> None:
    read_anything(lines, tmp_path)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=LINES)
def test_tens_of_thousands_of_lines_give_a_pool_or_an_error(lines: list[bytes], tmp_path: Path) -> None:
    read_anything(lines, tmp_path)


def test_a_record_may_not_be_read_twice_as_deep(tmp_path: Path) -> None:
    # a record just below the limit survives the way through the pool with the interpreter's own limit
    nested: Any = "x"
    for _ in range(95):
        nested = [nested]
    (tmp_path / "data.jsonl").write_bytes(written({"prompt": "q", "response": "a", "deep": nested}))
    pool, _ = canonicalise([tmp_path / "data.jsonl"], tmp_path / "pool")
    assert sys.getrecursionlimit() > 200 and next(pool.samples())["meta"]["deep"] == nested
