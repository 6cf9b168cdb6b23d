"""The command line as a user meets it: exit codes, one-line errors, JSON, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokencredit.cli import methods
from tokencredit.cli.main import VERBS, main
from tokencredit.files import parse_yaml
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.tasks import get_task
from tokencredit.methods.table import estimators, presets, transforms
from tokencredit.progress import printable
from tokencredit.runs.stop import Stopped


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
        (["train", "{folder}"], "cannot read the config file"),
        (["train", "{config}", "--set", "credit={hapo: {alpha: 0.3}"], "is not valid YAML"),
        (["train", "{config}", "--set", "task=[countdown]"], "`task` must be a text"),
        (["train", "{config}", "--set", "steps=1000000000"], "problems to draw before the first step"),
        (["train", "{config}", "--set", "trainer.report_to=wandb"], "wandb, which is not installed"),
        (["train", "{config}", "--set", "trainer.eval_strategy=steps"], "`trainer.eval_strategy` cannot be set"),
        (["train", "{config}", "--out", "{config}"], "is a file"),
        (["train", "{config}", "--set", "name=\x1b[31mred", "--set", "steps=\x1b[2J"], "is not valid YAML"),
        (["train", "{config}", "--nproc-per-node", "2"], "needs `--launch`"),
        (["compare", "missing.yaml", "--credit", "grpo"], "no config file"),
        (["compare", "{config}", "--credit", "grpoo"], "did you mean 'grpo'"),
        (["compare", "{config}", "--credit", "{hapo: {alfa: 1}}"], "hapo has no hyperparameter 'alfa'"),
        (["compare", "{config}", "--credit", "[unclosed"], "YAML"),
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
    assert "\x1b" not in err


def test_the_version_and_the_verbs_need_no_torch() -> None:
    code = "import sys\ntry:\n    from tokencredit.cli.main import main\n    main([sys.argv[1]])\n"
    code += "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules)"
    for argument, expected in (("--version", "tokencredit 0."), ("--help", "list the methods")):
        told = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True).stdout
        assert expected in told
        assert told.endswith("0 False\n")
    module = subprocess.run(
        [sys.executable, "-m", "tokencredit", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout.startswith("tokencredit 0.")


def test_a_second_listing_of_the_methods_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCREDIT_CACHE", str(tmp_path))
    described = methods.read_listing()
    (kept,) = tmp_path.glob("methods-*.json")
    code = "import sys; from tokencredit.cli.main import main; main(['methods', 'hapo']); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("hapo (preset)") and told.endswith("False\n")
    kept.write_text("[]")  # damaged: described again
    assert methods.read_listing() == described
    monkeypatch.setattr(methods, "_hash_sources", lambda: "other")  # the code has changed: described again
    assert methods.read_listing() == described
    assert [path.name for path in tmp_path.glob("methods-*.json")] == ["methods-other.json"]


def test_every_verb_has_its_own_help(capsys: pytest.CaptureFixture) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        assert f"tokencredit {verb}" in capsys.readouterr().out


def test_a_preset_is_shown_with_paper_equation_page_and_config(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(capsys, "methods", "hapo")
    assert code == 0
    for expected in ("arXiv:2604.11056", "docs/methods/hapo.md", "credit: {hapo: {alpha: 0.2}}", "clip(z", "entropies"):
        assert expected in out
    assert set(json.loads(call(capsys, "methods", "hapo", "--json")[1])) >= {"papers", "page", "steps", "pipeline"}


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(28, "No space left on device", "x/run.json"), 2, "error: No space left on device (x/run.json)"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: Permission denied (x)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed\nwriting"),
            2,
            "error: a file",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1102976 vs 1102864"),
            2,
            "error: a file",
        ),
        (MemoryError(), 2, "error: this machine's memory is full"),
        (Stopped(15, "stopped after step 3 of 9"), 143, "stopped after step 3 of 9; the same command goes on from the"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_faults_of_the_machine_are_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("tokencredit.cli.methods.run", fail)
    got, _, err = call(capsys, "methods")
    assert got == code
    assert err.startswith(expected)
    assert err.count("\n") <= 2


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tokencredit.cli.methods.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["methods"])


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(get_task("countdown").alphabet)
    for part in (build_model(tokenizer, layers=1, width=16, heads=2, seed=3), tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"task: countdown\nmodel: {tmp_path / 'model'}\nsteps: 2\nprompts_per_step: 2\n"
        "trainer: {num_generations: 4, learning_rate: 1e-3}\n"
    )
    code, out, err = call(capsys, "train", str(config), "--dry-run", "--out", str(tmp_path / "run"))
    assert code == 0
    assert "2 prompts × 4 generations = 8 rows" in err
    assert parse_yaml(out, "the output")["trainer"]["learning_rate"] == 1e-3
    code, out, _ = call(capsys, "train", str(config), "--dry-run", "--json", "--out", str(tmp_path / "run"))
    assert json.loads(out)["plan"]["learning rate"].startswith("0.001, linear")
    assert not (tmp_path / "run").exists()


def test_text_from_elsewhere_is_printed_as_it_is_spelled() -> None:
    assert printable("a\x1b[31mb[/b]\u202e\ud800\tc\nd") == "a\\x1b[31mb[/b]\\u202e\\ud800\tc\nd"


def test_doctor_finds_the_seams(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    assert checks["TRL's GRPOTrainer._compute_loss"]["status"] == "ok"


def test_doctor_names_the_fix(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("tokencredit.doctor.hosts", fromlist=["x"]).TRL_SEAMS, "_gone", ("inputs",))
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "FAIL  TRL's GRPOTrainer._gone: missing" in out
    assert "fix: " in out
