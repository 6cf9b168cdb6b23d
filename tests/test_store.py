"""Records written during training come back exactly, whatever the moment a run was killed."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tokencredit.batch.records import CreditRecord, TokenBatch
from tokencredit.batch.store import RecordStore
from tokencredit.errors import TokenCreditError


def make_record(
    step: int = 0, *, rows: int = 2, length: int = 3, entropies: bool = True, tokens: str = "a", scored: bool = False
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
        scored=torch.arange(rows) > 0 if scored else None,
        progress=0.1 * step,
        step=7 * step if scored else None,
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


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production, where no type checker stands before the gate."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def edit_line(folder: Path, number: int = 0, **changed: object) -> None:
    """Change one line of the index as an earlier version, or a hand, would: None drops a key, and so the hash."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    content = json.loads(lines[number]) | {"digest": None} | changed
    lines[number] = json.dumps({key: value for key, value in content.items() if value is not None})
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")


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


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(0))
    child = os.fork()
    if child == 0:  # dies while the tensors lie under a temporary name, and holds the lock
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        store.append(make_record(1))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 1 and RecordStore(tmp_path).steps == [0]
    store.append(make_record(1))
    assert not list(tmp_path.glob(".*.tmp"))
    assert_same(RecordStore(tmp_path).read(1), make_record(1))


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
    with pytest.raises(
        TokenCreditError, match=r"000000-step-0\.safetensors: the bytes are not those that were written"
    ):
        store.read(0)
    edit_line(tmp_path, sha256=None)
    with pytest.raises(TokenCreditError, match=r"000000-step-0\.safetensors is no safetensors file"):
        RecordStore(tmp_path).read(0)
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


def test_scored_and_step_come_back(tmp_path: Path) -> None:
    records = [make_record(1, scored=True), make_record(2, rows=1, scored=True), make_record(3)]
    store = RecordStore(tmp_path)
    for record in records:
        store.append(record)
    for found, expected in zip(RecordStore(tmp_path), records, strict=True):
        assert_same(found, expected)
    # A reader that knows neither finds the tensors that it knows, and keys that it skips.
    assert "scored" not in load_file(tmp_path / "000000-step-1.safetensors")
    assert json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["schema"] == 1


def test_records_without_hashes_are_read(tmp_path: Path) -> None:
    RecordStore(tmp_path).append(make_record(0))
    edit_line(tmp_path, sha256=None)
    assert_same(RecordStore(tmp_path).read(0), make_record(0))


def test_two_stores_on_one_folder_lose_nothing(tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path), RecordStore(tmp_path)
    for step in range(6):
        first.append(make_record(step))
    for step in (6, 7):
        second.append(make_record(step))
    first.append(make_record(8))
    found = RecordStore(tmp_path)
    assert found.steps == first.steps == list(range(9))
    for step in range(9):
        assert_same(found.read(step), make_record(step))
    second.truncate(4)
    first.append(make_record(5))
    assert RecordStore(tmp_path).steps == [0, 1, 2, 3, 5]
    assert_same(RecordStore(tmp_path).read(-1), make_record(5))


def test_stores_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    def append(writer: int) -> None:
        store = RecordStore(tmp_path)
        for number in range(3):
            store.append(make_record(3 * writer + number))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append, range(3)))
    found = RecordStore(tmp_path)
    assert sorted(found.steps) == list(range(9))
    for step, record in zip(found.steps, found, strict=True):
        assert_same(record, make_record(step))
    assert len(list(tmp_path.glob("*.safetensors"))) == 9


@pytest.mark.parametrize("name", ["000001-step-1.safetensors", "records.jsonl"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    for step in range(3):
        RecordStore(tmp_path).append(make_record(step))
    whole = (tmp_path / name).read_bytes()
    first, last = 0, len(whole)
    if name == "records.jsonl":  # of the second line: all but the newlines around it and the name of its hash
        first = whole.index(b"\n") + 1
        last = whole.index(b"digest", first)
    for place in range(first, last, 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 7
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(
            TokenCreditError, match=r"bytes are not those|no JSON object|schema|plain file|whole number"
        ):
            list(RecordStore(tmp_path))
        assert_same(RecordStore(tmp_path).read(0), make_record(0)) if name != "records.jsonl" else None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"progress": []},
            r"record 0 \(step 0\), 000000-step-0\.safetensors: `progress` must be in \[0, 1\], got \[\]",
        ),
        ({"optimizer_step": -1}, "`step` must be a whole number of at least 0, got -1"),
        ({"tokens": [[1]]}, "`tokens` and `prompts` must be lists of texts"),
        ({"prompts": "p"}, "`tokens` and `prompts` must be lists of texts"),
        ({"scored": [1, 0]}, "`scored` must be a list of true and false"),
        ({"scored": [True]}, r"`scored` must have shape \[2\], got \[1\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_line_of_another_hand_is_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    RecordStore(tmp_path).append(make_record(0))
    edit_line(tmp_path, **changed)
    with pytest.raises(TokenCreditError, match=message):
        RecordStore(tmp_path).read(0)


@pytest.mark.parametrize("changed", [{"file": 3}, {"file": None}, {"file": "a\0b"}, {"step": "0"}, {"step": None}])
def test_a_line_that_names_nothing_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    RecordStore(tmp_path).append(make_record(0))
    edit_line(tmp_path, **changed)
    with pytest.raises(TokenCreditError, match=r"records\.jsonl, line 1"):
        RecordStore(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"advantages": None}, "there is no tensor 'advantages'"),
        ({"rewards": None}, "there is no tensor 'rewards'"),
        ({"temperature": torch.zeros(2)}, "this version knows no tensor 'temperature'"),
        ({"advantages": torch.zeros(2, 9)}, r"`advantages` are \[2, 9\]"),
        ({"entropies": torch.zeros(5)}, "`entropies` must have shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str) -> None:
    RecordStore(tmp_path).append(make_record(0))
    path = tmp_path / "000000-step-0.safetensors"
    changed = load_file(path) | tensors
    save_file({name: value for name, value in changed.items() if value is not None}, path)
    edit_line(tmp_path, sha256=None)
    with pytest.raises(TokenCreditError, match=message):
        RecordStore(tmp_path).read(0)


def test_a_damaged_last_line_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    RecordStore(tmp_path).append(make_record(0))
    whole = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(b"\xff" + whole[1:])
    with pytest.raises(TokenCreditError, match="line 1: no JSON object"):
        RecordStore(tmp_path)


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    store.append(make_record(0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TokenCreditError, match=r"cannot write .*000001-step-1\.safetensors.: No space left"):
            store.append(make_record(1))
    assert RecordStore(tmp_path).steps == [0]
    store.append(make_record(1))
    assert_same(RecordStore(tmp_path).read(1), make_record(1))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(TokenCreditError, match="cannot create the folder"):
        RecordStore(tmp_path / "taken").append(make_record(0))
