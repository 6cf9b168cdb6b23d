"""Readers answer with a value or one line; writers leave a whole file or none; a folder has one owner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokencredit import files
from tokencredit.errors import TokenCreditError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("3.0e-4", 3e-4), ("-2E3", -2000.0), ("1:30", "1:30"), ("0x1f", 31), ("012", 12), ("0o17", 15),
     ("1_000", "1_000"), ("2026-11-27", "2026-11-27"), (".5", 0.5), ("7.", 7.0), (".inf", float("inf")), ("e5", "e5"),
     ("1e", "1e"), ("true", True), ("no", False), ("~", None)],
)  # fmt: skip
def test_numbers_of_yaml_1_2(text: str, value: object) -> None:
    assert files.parse_yaml(text, "text") == value


def test_text_that_looks_like_a_number_survives_a_round_trip() -> None:
    value = {"a": "1e-6", "b": 1e-6, "c": ["012", "1:30", "2026-11-27", 10**20]}
    assert files.parse_yaml(files.dump_yaml(value), "text") == value


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00bad", b"[" * 3000, b"a: [1", b"a: " + b"9" * 5000, b"a: !!python/object:os.system x", b"a: b: c",
     b"\x00", b"? {a: b}\n: 1"],
)  # fmt: skip
def test_bad_yaml_is_one_line_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(TokenCreditError, match=r"config\.yaml") as caught:
        files.read_yaml(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[" * 100_000, b"9" * 5000, b""])
def test_bad_json_is_one_line_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(TokenCreditError, match=r"run\.json"):
        files.read_json(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="no config"):
        files.read_yaml(tmp_path / "absent.yaml", "config")
    with pytest.raises(TokenCreditError, match="cannot read"):
        files.read_text(tmp_path)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenCreditError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run.json"]


def test_a_folder_has_one_owner_and_a_killed_owner_frees_it(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from tokencredit import files\nwith files.lock_folder(pathlib.Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TokenCreditError, match=f"pid {holder.pid}"), files.lock_folder(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with files.lock_folder(tmp_path):
        assert (tmp_path / files.OWNER).read_text().strip() == str(os.getpid())
