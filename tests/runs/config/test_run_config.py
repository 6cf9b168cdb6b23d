"""Configs: defaults by kind of model, overrides, types, rewards, and errors that name the nearest key."""

from pathlib import Path
from typing import Any

import pytest
from support.small_runs import resolve
from trl import GRPOConfig

from tokencredit.errors import TokenCreditError
from tokencredit.runs.config.load import load_config
from tokencredit.runs.config.rewards import parse_rewards
from tokencredit.runs.config.trainer_fields import LORA_LEARNING_RATE

REAL = {"dataset": {"path": "x.jsonl"}, "reward": "a:b", "model": "org/model"}


def message(given: dict, overrides: list[str] | None = None) -> str:
    with pytest.raises(TokenCreditError) as caught:
        load_config(given, overrides)
    return str(caught.value)


def test_defaults_are_filled_in() -> None:
    config = resolve({"task": "countdown"})
    assert config["credit"] == "grpo"
    assert config["prompts_per_step"] == 32
    assert config["threads"] == 1
    assert config["trainer"]["num_generations"] == 16
    assert config["trainer"]["learning_rate"] == 3e-4
    assert config["evaluation"] == {"every": 20, "problems": 100, "samples": 8, "threshold": 0.0}


def test_a_model_that_is_not_the_labs_gets_trls_own_defaults() -> None:
    config = resolve(REAL)
    stock = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    for name in ("num_generations", "learning_rate", "loss_type", "beta", "temperature", "max_completion_length"):
        assert config["trainer"][name] == getattr(stock, name), name
    assert config["trainer"]["lr_scheduler_type"] == stock.lr_scheduler_type.value
    assert not {"save_steps", "save_total_limit", "report_to", "gradient_checkpointing"} & set(config["trainer"])
    assert config["threads"] is None
    assert config["prompts_per_step"] == 8
    # A lab's task does not make a model one of the lab's; it knows itself how long a response can be.
    task = resolve({"task": "countdown", "model": "org/model"})
    assert task["trainer"]["learning_rate"] == stock.learning_rate
    assert "max_completion_length" not in task["trainer"]


def test_lora_has_a_rate_of_its_own() -> None:
    assert resolve(REAL | {"lora": {"r": 4}})["trainer"]["learning_rate"] == LORA_LEARNING_RATE
    slow = REAL | {"lora": {"r": 4}, "trainer": {"learning_rate": 1e-6}}
    assert resolve(slow)["trainer"]["learning_rate"] == 1e-6
    assert resolve({"task": "countdown", "lora": {"r": 4}})["trainer"]["learning_rate"] == 3e-4


def test_a_resolved_config_resolves_to_itself() -> None:
    for given in ({"task": "countdown"}, REAL, REAL | {"lora": {"r": 4}}):
        once = resolve(given)
        assert resolve(once) == once


def test_a_section_keeps_the_defaults_that_it_does_not_name() -> None:
    config = resolve({"task": "countdown", "evaluation": {"every": 3}, "trainer": {"learning_rate": 1e-5}})
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
        ({"task": "countdown", "trainer": {"lr": 1}}, "did you mean 'learning_rate'?"),
        ({"task": "countdown", "learning_rate": 1}, "hint: write `trainer.learning_rate`"),
        ({"task": "countdown", "lr": 1}, "hint: write `trainer.learning_rate`"),
        ({"task": "countdown", "evaluation_split": "test"}, "hint: write `dataset.evaluation_split`"),
        ({"task": "countdown", "evaluation": {"evry": 1}}, "unknown key of `evaluation` 'evry'"),
        ({"task": "countdown", "evaluation": 5}, "`evaluation` must be a mapping, got 5"),
        ({"task": "countdown", "steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
        ({"task": "countdown", "steps": "ten"}, "`steps` must be a whole number of at least 1, got 'ten'"),
        ({"task": "countdown", "steps": True}, "`steps` must be a whole number of at least 1, got True"),
        ({"task": "countdown", "steps": 10**9}, "set dataset.count"),
        ({"task": "countdown", "threads": 10**30}, "`threads` must be a whole number"),
        ({"task": "countdown", "seed": -1}, "`seed` must be a whole number"),
        ({"task": "countdown", "records": {"every": -1}}, "`records.every` must be a whole number of steps"),
        ({"task": "countdown", "sampler": "quick"}, "unknown sampler 'quick'"),
        ({"task": ["countdown"]}, "`task` must be a text, or null, got ['countdown']"),
        ({"task": "countdown", "model": {}}, "`model` must be a text, got {}"),
        ({"task": "countdown", "stage": [[]]}, "`stage` must be a text, got [[]]"),
        ({"task": "countdown", "teacher": 1}, "`teacher` must be a mapping, or null, got 1"),
        ({"task": "countdown", "name": {"a", "b"}}, "name holds {"),
        ({"task": "countdown", 7: 1}, "has the key 7; a key must be a text"),
        ({"task": "countdown", "dataset": {"count": True}}, "`dataset.count` must be a whole number"),
        ({"task": "countdown", "trainer": {"num_generations": "four"}}, "`trainer.num_generations` must be a whole"),
        ({"task": "countdown", "trainer": {"max_completion_length": "x"}}, "must be a whole number of at least 1"),
        ({"task": "countdown", "trainer": {"learning_rate": float("nan")}}, "must be a number of at least 0, got nan"),
        ({"task": "countdown", "trainer": {"temperature": 0}}, "must be a number above 0, got 0"),
        ({"task": "countdown", "trainer": {"bf16": "maybe"}}, "must be true or false, or null, got 'maybe'"),
        ({"task": "countdown", "trainer": {"warmup_steps": [1]}}, "`trainer.warmup_steps` must be"),
        ({"task": "countdown", "trainer": {"eval_strategy": "steps"}}, "use the `evaluation` section"),
        ({"task": "countdown", "trainer": {"num_train_epochs": 3}}, "set `steps`"),
        ({"task": "countdown", "steps": 1, "trainer": {"max_steps": 3}}, "`steps` is 1 and `trainer.max_steps` is 3"),
        ({"task": "countdown", "seed": 1, "trainer": {"seed": 3}}, "`seed` is 1 and `trainer.seed` is 3"),
        ({"task": "countdown", "reward": "a:b"}, "brings its own prompts and reward"),
        ({"task": "countdown", "dataset": {"path": "x.jsonl"}}, "brings its own prompts and reward"),
        ({"credit": "grpo"}, "a config needs `task` or `dataset.path`"),
        ({"dataset": {"path": "x.jsonl"}}, "`dataset` needs `reward`"),
        ({"dataset": {"path": "x.jsonl"}, "reward": "a:b"}, "`dataset` needs `model`"),
        ({"dataset": {"path": "x.jsonl", "name": "main", "config": "other"}}, "`dataset.config` 'other'"),
    ],
)
def test_bad_configs_are_told_in_one_line(given: dict, expected: str) -> None:
    assert expected in message(given)


def test_an_unknown_trainer_field_does_not_list_all_of_them() -> None:
    assert len(message({"task": "countdown", "trainer": {"nonsense_field": 1}})) < 200


def test_max_steps_stands_for_steps() -> None:
    config = resolve({"task": "countdown", "trainer": {"max_steps": 7, "seed": 3}})
    assert (config["steps"], config["seed"]) == (7, 3)
    assert not {"max_steps", "seed"} & set(config["trainer"])


def test_the_config_of_a_hub_data_set_may_be_called_name() -> None:
    config = resolve(REAL | {"dataset": {"path": "openai/gsm8k", "name": "main"}})
    assert config["dataset"]["config"] == "main"
    assert "name" not in config["dataset"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("a:b", [("a:b", 1.0)]),
        (["a:b", "c:d"], [("a:b", 1.0), ("c:d", 1.0)]),
        ({"a:b": 2, "c:d": 0.5}, [("a:b", 2.0), ("c:d", 0.5)]),
        ([{"reward": "a:b", "weight": 0.25}, "org/judge"], [("a:b", 0.25), ("org/judge", 1.0)]),
        ({"reward": "a:b", "weight": 3}, [("a:b", 3.0)]),
    ],
)
def test_every_form_of_reward(given: Any, expected: list) -> None:
    assert [tuple(reward) for reward in parse_rewards(given)] == expected
    assert resolve(REAL | {"credit": "grpo", "reward": given or "a:b"})["reward"] == (given or "a:b")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, "`reward` must be a name"),
        ([], "`reward` must be a name"),
        ([["a:b"]], "a reward must be a name or"),
        ({"a:b": "much"}, "the weight of the reward 'a:b' must be a number, got 'much'"),
        ({"a:b": float("inf")}, "must be a number, got inf"),
        (["a:b", "a:b"], "is named twice"),
        ([{"reward": "a:b", "wait": 1}], "did you mean 'weight'?"),
        ([{"reward": 3}], "must be named by a text"),
    ],
)
def test_rewards_that_are_none(given: Any, expected: str) -> None:
    assert expected in message(REAL | {"reward": given})


def test_the_weights_of_trl_must_agree() -> None:
    two = REAL | {"reward": ["a:b", "c:d"]}
    assert resolve(two | {"trainer": {"reward_weights": [1, 2]}})
    assert "must be a list of 2 numbers" in message(two | {"trainer": {"reward_weights": [1]}})
    weighted = REAL | {"reward": {"a:b": 2, "c:d": 1}, "trainer": {"reward_weights": [1, 1]}}
    assert "give different weights" in message(weighted)


def test_overrides() -> None:
    config = resolve(
        {"task": "countdown", "credit": "hapo"}, ["credit.alpha=3e-1", "trainer.learning_rate=1e-4", "seed=4"]
    )
    assert config["credit"] == {"hapo": {"alpha": 0.3}}
    assert config["trainer"]["learning_rate"] == 1e-4
    assert config["seed"] == 4
    assert "got 'seed'" in message({"task": "countdown"}, ["seed"])
    assert "needs a preset name" in message({"task": "countdown", "credit": ["group_normalized"]}, ["credit.alpha=1"])
    assert "is not valid YAML" in message({"task": "countdown"}, ["credit={hapo: {alpha: 0.3}"])
    assert resolve({"task": "countdown"}, ["seed=1", "seed=2"])["seed"] == 2


def test_an_override_that_would_undo_an_earlier_one_is_refused() -> None:
    given = {"task": "countdown"}
    assert "the earlier `--set credit.alpha=…`" in message(given, ["credit.alpha=0.4", "credit=hapo"])
    assert resolve(given, ["credit=hapo", "credit.alpha=0.4"])["credit"] == {"hapo": {"alpha": 0.4}}
    assert "the earlier `--set trainer.beta=…`" in message(given, ["trainer.beta=0.1", "trainer={}"])


def test_numbers_as_yaml_1_2_spells_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: countdown\ntrainer: {learning_rate: 1e-6}\ncredit: {hapo: {alpha: 3e-1}}\n")
    config = resolve(path)
    assert config["trainer"]["learning_rate"] == 1e-6
    assert config["credit"] == {"hapo": {"alpha": 0.3}}


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match="no config file"):
        resolve(tmp_path / "missing.yaml")
    with pytest.raises(TokenCreditError, match="cannot read the config file"):
        resolve(tmp_path)
    bad = tmp_path / "bad.yaml"
    for content, expected in (
        (b"a: [1", "is not valid YAML"),
        (b"[1, 2]", "must hold a mapping"),
        (b"\xff\xfebad", "is not UTF-8"),
        ("task: countdown".encode("utf-16"), "is not UTF-8"),
        (b"[" * 2000, "nested too deeply"),
        (b"seed: " + b"9" * 5000, "is not valid YAML"),
        (b"credit: &a [*a]", "nested more than 50 levels"),
        (b"name: !!set {a, b}", "name holds"),
    ):
        bad.write_bytes(content)
        with pytest.raises(TokenCreditError, match=expected):
            resolve(bad)


def test_an_alias_of_aliases_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(TokenCreditError, match="more than 10,000 values"):
        resolve(tmp_path / "laughs.yaml")


def test_modules_beside_the_config_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    (tmp_path / "credit_beside_config.py").write_text(
        "def mine(batch):\n    return batch.response_mask * batch.rewards[:, None]\n"
    )
    (tmp_path / "config.yaml").write_text("task: countdown\ncredit: credit_beside_config:mine\n")
    assert resolve(tmp_path / "config.yaml")["credit"] == "credit_beside_config:mine"


def test_the_shipped_examples_resolve() -> None:
    for path in sorted(Path("examples").glob("*.yaml")):
        assert resolve(path)["steps"] > 0
