"""The tables: rows beside their functions, one row per method, aliases of twin presets, names that were renamed."""

import json
from typing import Any

import pytest

from tokencredit import Pipeline, TokenCreditError, get_pipeline
from tokencredit.methods.spec import MethodSpec, Rows
from tokencredit.methods.table import (
    ALIASES,
    BASELINE,
    CONTROLS,
    ESTIMATORS,
    EXACT,
    HOST_ESTIMATOR,
    PRESETS,
    TRANSFORMS,
    merge_rows,
    presets,
    read_rows,
)
from tokencredit.pipeline.labels import label_of, reports_in, step_names


def test_every_row_is_beside_its_function() -> None:
    for module, rows in read_rows().items():
        for name, spec in (rows.estimators | rows.transforms).items():
            assert spec.fn.__module__ == module, name
            assert spec.fn.__name__ == name


def test_a_name_has_one_row() -> None:
    one = Rows(presets={"mine": ["group_normalized"]})
    with pytest.raises(TokenCreditError, match="b takes the name 'mine', which presets have"):
        merge_rows("presets", {"a": one, "b": one})


def test_no_two_presets_are_the_same_pipeline() -> None:
    configs = [json.dumps(get_pipeline(name).to_config()) for name in PRESETS]
    assert len(set(configs)) == len(configs), "make one of them an alias"


def test_names_that_the_rest_asks_for() -> None:
    assert (HOST_ESTIMATOR, BASELINE, EXACT) == ("group_normalized", "grpo", "exact")
    assert [name for name, spec in ESTIMATORS.items() if spec.ignores_reward] == ["teacher_log_ratio"]
    assert all(Pipeline.of(*steps).chains for steps in CONTROLS.values())


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_an_alias_is_its_preset_under_another_name(name: str) -> None:
    assert ALIASES[name].of in presets() and ALIASES[name].differs and name not in ESTIMATORS
    pipeline, twin = get_pipeline(name), get_pipeline(ALIASES[name].of)
    assert (pipeline.name, pipeline.chains) == (name, twin.chains)
    assert label_of(name) == name
    assert label_of([name, "reverse"]) == f"{name} → reverse"
    assert Pipeline.parse({name: {}}).chains == twin.chains
    assert Pipeline.parse(f"0.5 * grpo + 0.5 * {name}").chains[1].estimator == twin.chains[0].estimator


def test_an_alias_takes_hyperparameters_and_cannot_stand_behind_an_estimator() -> None:
    assert get_pipeline("opsd", lam=1.25).chains == get_pipeline("exopd").chains
    with pytest.raises(
        TokenCreditError, match=r"'hepo' can only start a pipeline, .* \(group_normalized → top_entropy\)"
    ):
        Pipeline.of("grpo", "hepo")


# Configs that were written before: (step, its hyperparameters then, today's, and the label of a run with it).
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prefix_discrepancy", {"floor": False, "scale": "unit_mass"}, {"at_least_one": False, "renorm": "unit_mass"}),
    ("gtpo", {"normalize": False}, {"standardize": False}),
    ("attention_gate", {"signal": "predictive"}, {"entropy": "predictive"}),
    (
        "directed_self_distillation",
        {"direction": "novelty", "only": "correct"},
        {"pull": "novelty", "responses": "correct"},
    ),
    ("rlsd", {"form": "paper"}, {"form": "minimum"}),
]


@pytest.mark.parametrize(("step", "then", "now"), OLDER)
def test_older_names_still_read(step: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    older, newer = (Pipeline.of("group_normalized", {step: given}) for given in (then, now))
    assert older.chains == newer.chains and older.to_config() == newer.to_config()


def test_a_run_keeps_the_label_of_its_config() -> None:
    config = ["group_normalized", {"attention_gate": {"signal": "predictive"}}]
    assert label_of(config) == "group_normalized → attention_gate(signal=predictive)"
    config[1] = {"attention_gate": {"entropy": "predictive"}}
    assert label_of(config) == "group_normalized → attention_gate(entropy=predictive)"


def test_an_override_by_an_older_name_replaces_todays() -> None:
    assert get_pipeline("iw_opd_surrogate", floor=True).chains == get_pipeline("iw_opd").chains
    with pytest.raises(TokenCreditError, match="has `at_least_one` twice: 'floor' is its old name"):
        Pipeline.of("opd", {"prefix_discrepancy": {"at_least_one": True, "floor": True}})


def test_a_word_has_one_kind_of_value() -> None:
    kinds: dict[str, set[type]] = {}
    for spec in (*ESTIMATORS.values(), *TRANSFORMS.values()):
        for name, default in spec.defaults.items():
            kinds.setdefault(name, set()).add(bool if isinstance(default, bool) else type(default))
    words = {name: found - {type(None)} for name, found in kinds.items()}
    assert {name: found for name, found in words.items() if len(found) > 1} == {}


def test_what_the_report_asks_of_a_stored_pipeline() -> None:
    config = get_pipeline("0.5 * arca + 0.5 * dasd").to_config()
    assert step_names(config) == [
        "group_normalized",
        "adapter_residual",
        "group_normalized",
        "directed_self_distillation",
    ]
    assert reports_in("bonus", config) and reports_in("signals", config)
    assert not reports_in("bonus", get_pipeline("iw_opd").to_config())
    assert not reports_in("bonus", None) and not reports_in("signals", ["gone_method", {"module:function": {}}])


def test_a_row_accepts_older_names() -> None:
    spec = MethodSpec(fn=TRANSFORMS["gtpo"].fn, paper="-", renamed={"old": "standardize"})
    assert spec.accepts("old") and spec.accepts("standardize") and not spec.accepts("older")
