"""The command line as a user meets it: exit codes, one-line errors, JSON, no traceback."""

import json
from pathlib import Path

import pytest

from tokencredit.cli.main import main
from tokencredit.methods import estimators, presets, transforms


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_methods_lists_every_row(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(capsys, "methods", "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["name"] for row in found["methods"]} == {*estimators(), *transforms()}
    assert set(found["presets"]) == set(presets())
    code, out, _ = call(capsys, "methods")
    assert code == 0
    assert "entropy_capacity" in out


@pytest.mark.parametrize("name", ["entropy_capacity", "hapo", "grpo", "empg"])
def test_one_method_in_full(capsys: pytest.CaptureFixture, name: str) -> None:
    code, out, _ = call(capsys, "methods", name)
    assert code == 0
    assert name in out
    assert "needs:" in out


def test_an_unknown_method_names_the_nearest(capsys: pytest.CaptureFixture) -> None:
    code, out, err = call(capsys, "methods", "entropy_capacty")
    assert (code, out) == (2, "")
    assert "did you mean 'entropy_capacity'?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "missing.yaml"], "no config file"),
        (["compare", "missing.yaml", "--credit", "grpo"], "no config file"),
        (["compare", "{config}", "--credit", "grpoo"], "did you mean 'grpo'"),
        (["compare", "{config}", "--credit", "{hapo: {alfa: 1}}"], "hapo has no hyperparameter 'alfa'"),
        (["compare", "{config}", "--credit", "[unclosed"], "is no YAML"),
        (["compare", "{config}", "--credit", "grpo", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "{config}", "--credit", "grpo", "--set", "stepz=3"], "did you mean 'steps'"),
        (["report", "{folder}/nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("task: countdown\n")
    filled = [part.replace("{config}", str(config)).replace("{folder}", str(tmp_path)) for part in arguments]
    code, out, err = call(capsys, *filled)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err


def test_doctor_finds_the_seams(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    assert checks["TRL's GRPOTrainer._compute_loss"]["status"] == "ok"


def test_doctor_names_the_fix(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("tokencredit.adapters.doctor", fromlist=["x"]).TRL_SEAMS, "_gone", ("inputs",))
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "FAIL  TRL's GRPOTrainer._gone: missing" in out
    assert "fix: " in out
