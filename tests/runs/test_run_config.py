"""Configs: defaults, overrides, and errors that name the nearest key."""

from pathlib import Path

import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.runs.config import load_config, resolve_config


def message(given: dict, overrides: list[str] | None = None) -> str:
    with pytest.raises(TokenCreditError) as caught:
        load_config(given, overrides)
    return str(caught.value)


def test_defaults_are_filled_in() -> None:
    config = resolve_config({"task": "countdown"})
    assert config["credit"] == "grpo"
    assert config["trainer"]["num_generations"] == 16
    assert config["evaluation"] == {"every": 20, "problems": 100, "samples": 8, "threshold": 0.0}


def test_a_section_keeps_the_defaults_that_it_does_not_name() -> None:
    config = resolve_config({"task": "countdown", "evaluation": {"every": 3}, "trainer": {"learning_rate": 1e-5}})
    assert config["evaluation"] == {"every": 3, "problems": 100, "samples": 8, "threshold": 0.0}
    assert config["trainer"]["learning_rate"] == 1e-5
    assert config["trainer"]["num_generations"] == 16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"task": "countdown", "stepz": 3}, "unknown config key 'stepz', did you mean 'steps'?"),
        ({"task": "countdwn"}, "unknown task 'countdwn', did you mean 'countdown'?"),
        ({"task": "countdown", "credit": "hapoo"}, "unknown credit method 'hapoo', did you mean 'hapo'?"),
        ({"task": "countdown", "credit": {"hapo": {"alfa": 1}}}, "hapo has no hyperparameter 'alfa'"),
        ({"task": "countdown", "trainer": {"learnin_rate": 1}}, "did you mean 'learning_rate'?"),
        ({"task": "countdown", "evaluation": {"evry": 1}}, "unknown key in config section `evaluation` 'evry'"),
        ({"task": "countdown", "evaluation": 5}, "config section `evaluation` must be a mapping, got 5"),
        ({"task": "countdown", "steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
        ({"task": "countdown", "steps": "ten"}, "`steps` must be a whole number of at least 1, got 'ten'"),
        ({"task": "countdown", "records": {"every": -1}}, "`records.every` must be a whole number of steps"),
        ({"task": "countdown", "sampler": "quick"}, "unknown sampler 'quick'"),
        ({"credit": "grpo"}, "a config needs `task` or `dataset.path`"),
        ({"dataset": {"path": "x.jsonl"}}, "`dataset` needs `reward`"),
        ({"dataset": {"path": "x.jsonl"}, "reward": "a:b"}, "`dataset` needs `model`"),
    ],
)
def test_bad_configs_are_told_in_one_line(given: dict, expected: str) -> None:
    assert expected in message(given)


def test_overrides() -> None:
    config = load_config(
        {"task": "countdown", "credit": "hapo"}, ["credit.alpha=0.3", "trainer.learning_rate=1e-4", "seed=4"]
    )
    assert config["credit"] == {"hapo": {"alpha": 0.3}}
    assert config["trainer"]["learning_rate"] == 1e-4
    assert config["seed"] == 4
    assert "got 'seed'" in message({"task": "countdown"}, ["seed"])
    assert "needs a preset name" in message({"task": "countdown", "credit": ["group_normalized"]}, ["credit.alpha=1"])


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="no config file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(TokenCreditError, match="is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(TokenCreditError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")


def test_the_shipped_examples_resolve() -> None:
    for path in sorted(Path("examples").glob("*.yaml")):
        assert load_config(path)["steps"] > 0
