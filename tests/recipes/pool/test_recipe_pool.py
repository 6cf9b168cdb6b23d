import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.ingest import canonicalise, normalise, text_hash, to_sample
from tokencredit.recipes.pool.samples import hash_priority, load_pool, make_pool, splitmix64


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


PAIR = {"prompt": "2+2?", "response": "4"}


def test_id_golden() -> None:
    # sha256('[["user","2+2?"],["assistant","4"]]') starts with 88dd5474f0d64528
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert f"{text_hash(messages):016x}" == "88dd5474f0d64528"


def test_subset_hash_golden_ignores_order() -> None:
    # sha256("a\nb\nc") starts with ea7fb08b7a2d; the ids of a pool are hex, so the hash is fed directly
    from tokencredit.recipes.pool.samples import _hash_of_ids

    assert _hash_of_ids(np.array([b"a", b"b", b"c"])).startswith("ea7fb08b7a2d")
    pool = make_pool([3, 1, 2], ["x"] * 3, [1, 1, 1])
    assert pool.subset_hash(np.array([2, 0], np.int32)) == pool.subset_hash(np.array([0, 2], np.int32))
    assert pool.subset_hash(np.array([0, 1, 2], np.int32)) == pool.hash


def test_splitmix_and_hash_priority_goldens() -> None:
    assert int(splitmix64(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF
    numbers = np.arange(1, 7, dtype=np.uint64)
    assert (np.argsort(hash_priority(numbers, 42)) + 1).tolist() == [4, 2, 6, 5, 1, 3]
    assert (np.argsort(hash_priority(numbers, 7)) + 1).tolist() == [1, 2, 3, 5, 4, 6]


def test_normalisation_is_what_the_id_sees() -> None:
    assert normalise("caf\u0065\u0301  \r\nx\t\r\n\n") == "caf\u00e9\nx"
    assert normalise("  indented stays") == "  indented stays"


def test_repeats_are_numbered_and_sources_do_not_enter_the_id(tmp_path: Path) -> None:
    records = [{**PAIR, "source": "a"}, {"prompt": "1+1?", "response": "2"}, {**PAIR, "source": "b"}, PAIR]
    pool, rejected = canonicalise([write_jsonl(tmp_path / "raw.jsonl", records)], tmp_path / "pool")
    assert rejected == []
    base = "88dd5474f0d64528"
    assert [pool.ids[i].decode() for i in (0, 2, 3)] == [base, f"{base}~1", f"{base}~2"]
    assert len(set(pool.id64.tolist())) == 4
    again = load_pool(tmp_path / "pool")
    assert again.hash == pool.hash
    assert again.source_names == ("a", "b", "raw")
    sample = next(again.samples(np.array([2], np.int32)))
    assert sample["id"] == f"{base}~1" and sample["source"] == "b"
    assert again.positions_of([f"{base}~2", base]).tolist() == [3, 0]
    with pytest.raises(TokenCreditError, match="'nope' is not in the pool"):
        again.positions_of(["nope"])


@pytest.mark.parametrize(
    ("record", "roles"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "user assistant"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "user assistant"),
        ({"instruction": "do", "input": "this", "output": "done"}, "user assistant"),
        ({"question": "q", "answer": "a", "system": "s"}, "system user assistant"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "assistant"),
    ],
)
def test_formats(record: dict, roles: str) -> None:
    sample = to_sample(record, "file")
    assert [message["role"] for message in sample["messages"]] == roles.split()


BAD = [
    ("{not json", "not a JSON object"),
    ('["list"]', "expected an object, got list"),
    ('{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    ('{"prompt": "q", "response": "  "}', "empty response"),
    ('{"text": "x"}', "no messages and no prompt"),
    ('{"messages": [{"role": "narrator", "content": "q"}]}', "unknown role 'narrator'"),
    ('{"prompt": "q", "response": 4}', "expected text, got int"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = write_jsonl(tmp_path / "raw.jsonl", [PAIR, line, PAIR])
    with pytest.raises(TokenCreditError, match=r"raw\.jsonl:2: .*1 bad lines in all") as caught:
        canonicalise([path], tmp_path / "strict")
    assert reason in str(caught.value)
    assert not (tmp_path / "strict" / "pool.jsonl").exists()
    pool, rejected = canonicalise([path], tmp_path / "lenient", skip_bad=True)
    assert len(pool) == 2
    assert rejected[0].line == 2 and reason in rejected[0].reason
    assert reason in json.loads((tmp_path / "lenient" / "rejected.jsonl").read_text())["reason"]


def test_parquet_and_dataset_folders_give_the_same_pool(tmp_path: Path) -> None:
    import datasets

    records = [{"prompt": f"{i}+1?", "response": str(i + 1)} for i in range(20)]
    jsonl = write_jsonl(tmp_path / "data.jsonl", records)
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(tmp_path / "dict")
    hashes = {canonicalise([p], tmp_path / f"o{i}")[0].hash for i, p in enumerate((jsonl, tmp_path / "data.parquet"))}
    hashes.add(canonicalise([tmp_path / "folder"], tmp_path / "o2")[0].hash)
    assert len(hashes) == 1
    with pytest.raises(TokenCreditError, match="several splits: train"):
        canonicalise([tmp_path / "dict"], tmp_path / "o3")


def test_a_changed_pool_is_refused(tmp_path: Path) -> None:
    canonicalise([write_jsonl(tmp_path / "raw.jsonl", [PAIR])], tmp_path / "pool")
    with (tmp_path / "pool" / "pool.jsonl").open("a") as file:
        file.write("x")
    with pytest.raises(TokenCreditError, match="its index says"):
        load_pool(tmp_path / "pool")
    with pytest.raises(TokenCreditError, match="holds no pool"):
        load_pool(tmp_path)
