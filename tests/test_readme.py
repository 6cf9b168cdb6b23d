"""The README's Python runs, and its commands exist."""

import re
from pathlib import Path

import pytest

from tokencredit.cli.main import VERBS
from tokencredit.lab import model as lab_model
from tokencredit.lab.tasks import get_task

README = Path(__file__).parents[1] / "README.md"


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(task_name: str) -> Path:  # the snippet builds a trained model; here a fresh one of the same shape will do
        tokenizer = lab_model.build_tokenizer(get_task(task_name).alphabet)
        lab_model.build_model(tokenizer).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab_model, "warm_start", fresh)
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    variables: dict = {}
    exec(compile(snippet, "README.md", "exec"), variables)
    assert variables["trainer"].state.global_step == 2
    assert variables["trainer"].pipeline.name == "hapo"


def test_the_commands_exist() -> None:
    named = set(re.findall(r"`tokencredit (\w+)", README.read_text()))
    assert named <= set(VERBS)


def test_the_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
