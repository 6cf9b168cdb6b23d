"""Whatever a config, a file or `--set` holds, the result is a resolved config or one line of error."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokencredit.errors import TokenCreditError
from tokencredit.files import dump_yaml, parse_yaml
from tokencredit.runs.config.arguments import grpo_config, lora_config
from tokencredit.runs.config.load import load_config
from tokencredit.runs.config.run_config import RunConfig

DEFAULTS = RunConfig.defaults()
EVERYDAY, MANY = 100, 20_000
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

WORDS = (
    "countdown",
    "tiny",
    "hapo",
    "grpo",
    "auto",
    "fast",
    "a:b",
    "math:pi",
    ":x",
    "x.jsonl",
    "1e-4",
    "late",
    "\0",
    "",
)
KEYS = (
    *DEFAULTS,
    *(f"{section}.{key}" for section, keys in DEFAULTS.items() if isinstance(keys, dict) for key in keys),
    "dataset.name",
    "credit.alpha",
    "credit.hapo.alpha",
    "lora.r",
    "lora.target_modules",
    "teacher.kind",
    "collectors.attention_entropies",
    *(f"trainer.{name}" for name in ("num_generations", "learning_rate", "max_steps", "seed", "bf16", "report_to")),
    *(f"trainer.{name}" for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps")),
    *(f"trainer.{name}" for name in ("lr_scheduler_type", "optim", "loss_type", "scale_rewards", "reward_weights")),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.just(datetime.date(2026, 1, 1)),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from((*WORDS, "r", "kind", "alpha", "reward", "weight")) | scalars, inner, max_size=3
        )
        | st.frozensets(st.integers(0, 3), max_size=2)
    ),
    max_leaves=6,
)
bases = st.sampled_from(
    (
        {},
        {"task": "countdown"},
        {"dataset": {"path": "x.jsonl"}, "reward": "a:b", "model": "org/model"},
        {"task": "chain", "credit": {"hapo": {"alpha": 0.2}}, "lora": {"r": 2}, "trainer": {"beta": 0.1}},
    )
)


@st.composite
def configs(draw: st.DrawFn) -> dict[Any, Any]:
    config = dict(draw(bases))
    for path in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        section, _, key = path.partition(".")
        if not key:
            config[section] = draw(values)
        elif isinstance(config.get(section, {}), dict):
            config[section] = {**config.get(section, {}), key: draw(values)}
    if draw(st.integers(0, 9)) == 0:
        config[draw(scalars)] = draw(values)
    return config


assignments = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=20)),
    st.builds("{}={}".format, st.sampled_from(KEYS), values.map(repr)),
    st.builds("{}.{}={}".format, st.sampled_from(KEYS), st.text(max_size=4), scalars.map(str)),
)


def resolve_or_refuse(config: Any, overrides: list[str]) -> None:
    try:
        loaded = load_config(config, overrides)
    except TokenCreditError as error:
        assert "\n" not in error.message
        return
    resolved = loaded.to_mapping()
    json.dumps(resolved)
    assert repr(parse_yaml(dump_yaml(resolved), "the config")) == repr(resolved)  # nan is not equal to itself
    assert repr(load_config(resolved).to_mapping()) == repr(resolved)
    try:
        grpo_config(loaded, Path("unused"), 8)
        lora_config(loaded)
    except TokenCreditError as error:
        assert "\n" not in error.message


@settings(max_examples=EVERYDAY, deadline=None, suppress_health_check=CHECKS)
@given(configs(), st.lists(assignments, max_size=2))
def test_configs(config: Any, overrides: list[str]) -> None:
    resolve_or_refuse(config, overrides)


@settings(max_examples=EVERYDAY, deadline=None, suppress_health_check=CHECKS)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    resolve_or_refuse(path, [])


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=CHECKS)
@given(configs(), st.lists(assignments, max_size=3))
def test_many_configs(config: Any, overrides: list[str]) -> None:
    resolve_or_refuse(config, overrides)
