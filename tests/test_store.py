"""Records written during training come back exactly, whatever the moment a run was killed."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokencredit.errors import TokenCreditError
from tokencredit.records import CreditRecord, TokenBatch
from tokencredit.store import RecordStore


def make_record(
    step: int = 0, *, rows: int = 2, length: int = 3, entropies: bool = True, tokens: str = "a"
) -> CreditRecord:
    generator = torch.Generator().manual_seed(step)
    mask = torch.rand((rows, length), generator=generator) < 0.8
    values = torch.where(mask, torch.rand((rows, length), generator=generator), torch.nan)
    batch = TokenBatch(
        response_ids=torch.randint(0, 9, (rows, length), generator=generator),
        response_mask=mask,
        rewards=torch.rand(rows, generator=generator, dtype=torch.float64),
        group_ids=torch.arange(rows) // 2,
        old_logprobs=-values.bfloat16(),
        ref_logprobs=values,  # one storage, two names
        entropies=values if entropies else None,
        host_advantages=torch.ones(1).expand(rows),  # shares memory with itself
        progress=0.1 * step,
        step=7 * step,
    )
    return CreditRecord(
        step=step,
        pipeline=[{"group_normalized": {"eps": 1e-6}}],
        batch=batch,
        advantages=torch.where(mask, values, 0.0),
        tokens=[[tokens] * length] * rows,
        prompts=["p"] * rows,
    )


def assert_same(found: CreditRecord, expected: CreditRecord) -> None:
    for name in ("step", "pipeline", "tokens", "prompts"):
        assert getattr(found, name) == getattr(expected, name), name
    pairs = {
        item.name: (getattr(found.batch, item.name), getattr(expected.batch, item.name)) for item in fields(TokenBatch)
    }
    for name, (left, right) in (pairs | {"advantages": (found.advantages, expected.advantages)}).items():
        if isinstance(right, torch.Tensor):
            assert left.dtype == right.dtype and left.shape == right.shape, name
            assert torch.equal(bits(left), bits(right)), name
        else:
            assert left == right, name


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def test_reads_back_bit_for_bit(tmp_path: Path) -> None:
    records = [make_record(step, entropies=step % 2 == 0) for step in range(4)]
    store = RecordStore(tmp_path / "records")
    for record in records:
        store.append(record)
    again = RecordStore(tmp_path / "records")
    assert len(again) == 4 and again.steps == [0, 1, 2, 3]
    for found, expected in zip(again, records, strict=True):
        assert_same(found, expected)
    assert again.read(1).batch.entropies is None
    assert_same(again.read(-1), records[-1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), lone=st.sampled_from(["", "\ud800", "\x00", "\u2028", "\x85", "\r\n"]))
def test_any_text_survives(tmp_path: Path, text: str, lone: str) -> None:
    record = make_record(tokens=text + lone)
    store = RecordStore(tmp_path)
    store.append(record)
    assert RecordStore(tmp_path).read(-1).tokens == record.tokens


def test_empty_tensors_survive(tmp_path: Path) -> None:
    record = make_record(rows=2, length=0)
    RecordStore(tmp_path).append(record)
    assert_same(RecordStore(tmp_path).read(0), record)


def test_a_folder_without_records_is_empty_and_stays_untouched(tmp_path: Path) -> None:
    assert len(RecordStore(tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_ignored_and_overwritten(tmp_path: Path, cut: int) -> None:
    store = RecordStore(tmp_path)
    for step in range(3):
        store.append(make_record(step))
    whole = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(whole[:-cut])
    resumed = RecordStore(tmp_path)
    assert resumed.steps == [0, 1]
    resumed.append(make_record(2))
    assert (tmp_path / "records.jsonl").read_bytes() == whole
    assert_same(RecordStore(tmp_path).read(2), make_record(2))


def test_killed_between_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordStore(tmp_path).append(make_record(0))
    (tmp_path / "000001-step-1.safetensors").write_bytes(b"half")  # no line names it
    resumed = RecordStore(tmp_path)
    assert len(resumed) == 1
    resumed.append(make_record(1))
    assert_same(RecordStore(tmp_path).read(1), make_record(1))


def test_killed_while_writing_tensors_leaves_the_store_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.append(make_record(1))
    assert RecordStore(tmp_path).steps == [0]
    store.append(make_record(1))
    assert_same(RecordStore(tmp_path).read(1), make_record(1))
    assert not list(tmp_path.glob("*.tmp"))


def test_truncate_drops_a_step_and_what_follows(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for step in (0, 2, 2, 5):
        store.append(make_record(step))
    store.truncate(2)
    assert store.steps == RecordStore(tmp_path).steps == [0]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    store.append(make_record(3))
    assert RecordStore(tmp_path).steps == [0, 3]
    store.truncate(0)
    assert len(RecordStore(tmp_path)) == 0


def test_another_schema_is_refused(tmp_path: Path) -> None:
    RecordStore(tmp_path).append(make_record(0))
    line = json.loads((tmp_path / "records.jsonl").read_text())
    (tmp_path / "records.jsonl").write_text(json.dumps(line | {"schema": 99}) + "\n")
    with pytest.raises(TokenCreditError, match=r"records\.jsonl, line 1: records of schema 99") as caught:
        RecordStore(tmp_path)
    assert caught.value.hint is not None


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(0))
    path = tmp_path / "000000-step-0.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(TokenCreditError, match=r"000000-step-0\.safetensors is no safetensors file"):
        store.read(0)
    path.unlink()
    with pytest.raises(TokenCreditError, match=r"000000-step-0\.safetensors is missing") as caught:
        store.read(0)
    assert "copy the whole folder" in (caught.value.hint or "")


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(0))
    store.append(make_record(1))
    first, second = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(first[: len(first) // 2] + b"\n" + second)
    with pytest.raises(TokenCreditError, match="line 1: no JSON object"):
        RecordStore(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    RecordStore(tmp_path).append(make_record(0))
    line = json.loads((tmp_path / "records.jsonl").read_text())
    (tmp_path / "records.jsonl").write_text(json.dumps(line | {"file": "../other.safetensors"}) + "\n")
    with pytest.raises(TokenCreditError, match="plain file name"):
        RecordStore(tmp_path)


def test_a_pipeline_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    record = make_record(0)
    broken = CreditRecord(step=0, pipeline={1, 2}, batch=record.batch, advantages=record.advantages)
    with pytest.raises(TokenCreditError, match="is no JSON"):
        RecordStore(tmp_path / "records").append(broken)
    assert not (tmp_path / "records").exists()


def test_number_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="has 0 records"):
        RecordStore(tmp_path).read(0)


def test_records_that_hold_no_step_of_the_batch_still_read(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    store.append(make_record(3))
    line = json.loads(store.index.read_text())
    assert line.pop("batch_step") == 21
    store.index.write_text(json.dumps(line) + "\n")
    record = RecordStore(tmp_path / "records").read(0)
    assert record.step == 3 and record.batch.step is None
