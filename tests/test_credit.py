"""The one door: how pipelines are written, combined, refused and run."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import jaxtyping
import pytest
import torch
from batches import make_batch
from jaxtyping import Float
from torch import Tensor

import tokencredit.methods.table as tables
from tokencredit import (
    ESTIMATORS,
    PRESETS,
    TRANSFORMS,
    Pipeline,
    TokenBatch,
    TokenCreditError,
    assign_credit,
    get_pipeline,
)
from tokencredit.methods.spec import Limit, MethodSpec
from tokencredit.seeds import derive, generator

ADVANTAGES = torch.tensor([0.25, -1.5, 1e-8, 3.4e38, -0.0, 1 / 3])


def small(**fields: Any) -> TokenBatch:
    """Two responses of two tokens in one group, rewards 1 and 0: `group_centered` gives +0.5 and -0.5."""
    given = {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([0, 0])} | fields
    return TokenBatch(
        response_ids=torch.arange(4).reshape(2, 2), response_mask=torch.ones(2, 2, dtype=torch.bool), **given
    )


@contextmanager
def jaxtyped(checked: bool) -> Iterator[None]:
    """With or without the type checker of the suite, which does not run in production."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", not checked)
        yield


def credit_of(config: Any, batch: TokenBatch | None = None) -> list[list[float]]:
    return assign_credit(config, small() if batch is None else batch).tolist()


# Functions of a user; this module is importable as `test_credit`.
def halve(advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, divisor: float = 2.0) -> Tensor:
    return advantages / divisor


def outcome_of_mine(batch: TokenBatch, *, level: float = 4.0) -> Tensor:
    return torch.full(batch.response_mask.shape, level)


def by_value(advantages: Tensor, batch: TokenBatch) -> Tensor:
    return advantages * batch.require("values")


by_value.requires = ("values",)  # type: ignore[attr-defined]
by_value.scope = "token"  # type: ignore[attr-defined]


def needs_strength(advantages: Tensor, batch: TokenBatch, *, strength: float) -> Tensor:
    return advantages * strength


def too_narrow(advantages: Tensor, batch: TokenBatch) -> Tensor:
    return advantages[:, :1]


def explodes(advantages: Tensor, batch: TokenBatch) -> Tensor:
    return torch.where(advantages > 0, torch.nan, advantages)


# --- writing pipelines


def test_weights_in_an_expression() -> None:
    # 0.5 * (+-0.5) + 2 * (+-1 leave-one-out): +-(0.25 + 2)
    assert credit_of("0.5 * dr_grpo + 2 * rloo") == [[2.25, 2.25], [-2.25, -2.25]]
    assert credit_of("-1e-1*dr_grpo") == [[pytest.approx(-0.05)] * 2, [pytest.approx(0.05)] * 2]
    assert credit_of("dr_grpo + dr_grpo") == [[1.0, 1.0], [-1.0, -1.0]]
    assert Pipeline.parse("0.5 * dr_grpo + 2 * rloo").name == "0.5 * dr_grpo + 2 * rloo"


def test_the_same_sum_three_ways() -> None:
    written = Pipeline.parse("0.25 * grpo + 3 * rloo")
    python = 0.25 * get_pipeline("grpo") + get_pipeline("rloo") * 3
    config = Pipeline.parse(
        {"weighted_sum": [{"weight": 0.25, "credit": "grpo"}, {"weight": 3, "credit": ["leave_one_out"]}]}
    )
    assert written.to_config() == python.to_config() == config.to_config()
    assert credit_of(written) == credit_of(python) == credit_of(config)


def test_weights_of_nested_sums_multiply() -> None:
    inner = {"weighted_sum": [{"weight": 2.0, "credit": "dr_grpo"}, {"weight": 1.0, "credit": "rloo"}]}
    # 0.5 * (2 * 0.5 + 1 * 1) = 1
    assert credit_of({"weighted_sum": [{"weight": 0.5, "credit": inner}]}) == [[1.0, 1.0], [-1.0, -1.0]]


def test_a_list_of_steps_and_a_preset_with_hyperparameters() -> None:
    steps = Pipeline.parse(["group_normalized", {"entropy_capacity": {"alpha": 0.3}}])
    preset = Pipeline.parse({"hapo": {"alpha": 0.3}})
    assert steps.to_config() == preset.to_config() == get_pipeline("hapo", alpha=0.3).to_config()
    assert preset.requires == {"entropies"}
    assert Pipeline.parse({"hapo": None}).to_config() == get_pipeline("hapo").to_config()
    assert Pipeline.parse(preset) is preset


def test_to_config_spells_out_every_hyperparameter_and_reads_back() -> None:
    for config in (
        "hapo",
        "0.5 * grpo + 0.5 * forking_tokens",
        ["group_centered", "reverse", {"random_mask": {"keep": 1}}],
    ):
        pipeline = Pipeline.parse(config)
        written = json.loads(json.dumps(pipeline.to_config()))
        assert Pipeline.parse(written).to_config() == pipeline.to_config()
    assert Pipeline.parse("w_reinforce").to_config() == [
        {"signed_outcome": {"positive": 0.1, "negative": 1.0, "threshold": 0.0}}
    ]


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    value = get_pipeline("hapo", alpha=1).to_config()[1]["entropy_capacity"]["alpha"]
    assert isinstance(value, float) and value == 1.0


# --- overrides


def test_an_override_goes_to_the_step_that_takes_it() -> None:
    config = get_pipeline("hapo", eps=1e-3, phi=4.0).to_config()
    assert config[0] == {"group_normalized": {"eps": 1e-3}}
    assert config[1]["entropy_capacity"]["phi"] == 4.0 and config[1]["entropy_capacity"]["alpha"] == 0.2
    assert PRESETS["hapo"] == ["group_normalized", {"entropy_capacity": {"alpha": 0.2, "phi": 2.0}}]


@pytest.fixture
def two_alphas(monkeypatch: pytest.MonkeyPatch) -> None:
    with_two = PRESETS | {"two": ["group_normalized", "entropy_bonus", {"entropy_capacity": {"phi": 3.0}}]}
    monkeypatch.setattr("tokencredit.methods.table.presets", lambda: with_two)


def test_an_ambiguous_override_asks_which(two_alphas: None) -> None:
    with pytest.raises(TokenCreditError, match="'alpha' of two is ambiguous") as caught:
        get_pipeline("two", alpha=0.1)
    assert "entropy_bonus.alpha" in str(caught.value.hint) and "entropy_capacity.alpha" in str(caught.value.hint)
    config = get_pipeline("two", **{"entropy_capacity.alpha": 0.1}).to_config()
    assert config[1]["entropy_bonus"]["alpha"] == 0.4
    assert config[2]["entropy_capacity"]["alpha"] == 0.1 and config[2]["entropy_capacity"]["phi"] == 3.0
    with pytest.raises(TokenCreditError, match=r"two has no hyperparameter .reverse\.alpha.; accepted: .*kappa"):
        get_pipeline("two", **{"reverse.alpha": 0.1})


# --- own functions


def test_a_users_function_needs_no_registration() -> None:
    assert credit_of(Pipeline.of("group_centered", halve)) == [[0.25, 0.25], [-0.25, -0.25]]
    assert credit_of(Pipeline.of("group_centered", (halve, {"divisor": 4.0}))) == [[0.125] * 2, [-0.125] * 2]
    assert credit_of(Pipeline.of(outcome_of_mine)) == [[4.0, 4.0], [4.0, 4.0]]


def test_module_and_function_in_a_config() -> None:
    config = ["group_centered", {"test_credit:halve": {"divisor": 5.0}}]
    assert credit_of(config) == [[pytest.approx(0.1)] * 2, [pytest.approx(-0.1)] * 2]
    pipeline = Pipeline.parse(config)
    assert (
        Pipeline.parse(pipeline.to_config()).to_config()
        == pipeline.to_config()
        == [
            {"group_centered": {}},
            {"test_credit:halve": {"divisor": 5.0}},
        ]
    )
    assert credit_of("0.5 * test_credit:outcome_of_mine") == [[2.0, 2.0], [2.0, 2.0]]


def test_a_function_says_what_it_requires_and_how_far_it_reaches() -> None:
    pipeline = Pipeline.of("signed_outcome", by_value)
    assert (pipeline.requires, pipeline.scope) == ({"values"}, "response")
    assert Pipeline.of("signed_outcome", halve).scope == "batch"  # unknown, so the largest
    with pytest.raises(TokenCreditError, match="needs `values`"):
        assign_credit(pipeline, small())


# --- what a pipeline says of itself


def test_then_appends_to_every_chain() -> None:
    pipeline = (get_pipeline("dr_grpo") + get_pipeline("rloo")).then({"constant_scale": {"multiplier": 2.0}}, "reverse")
    assert [[step.name for step in chain.transforms] for chain in pipeline.chains] == [
        ["constant_scale", "reverse"]
    ] * 2
    assert credit_of(pipeline) == [[3.0, 3.0], [-3.0, -3.0]]
    assert pipeline.name == "dr_grpo + rloo → constant_scale → reverse"


@pytest.mark.parametrize(
    ("config", "identity"),
    [
        ("grpo", True),
        ("1.0 * grpo", True),
        (["group_normalized", {"entropy_capacity": {"alpha": 0.0}}], True),
        (["group_normalized", {"top_entropy": {"keep": 1}}, {"constant_scale": {"multiplier": 1.0}}], True),
        ({"hapo": {"alpha": 0, "renorm": "group"}}, True),
        ({"hapo": {"alpha": 0.0, "alpha_negative": 0.1}}, False),
        ("hapo", False),
        ("dr_grpo", False),
        ("0.5 * grpo", False),
        ("0.5 * grpo + 0.5 * grpo", False),
    ],
)
def test_is_identity(config: Any, identity: bool) -> None:
    assert Pipeline.parse(config).is_identity is identity


@pytest.mark.parametrize(
    "config", ["grpo", ["group_normalized", {"entropy_capacity": {"alpha": 0.0}}, {"random_mask": {"keep": 1.0}}]]
)
def test_identity_hands_on_the_hosts_advantages_bit_for_bit(config: Any) -> None:
    batch = make_batch(groups=(3, 3), holes=True, host_advantages=True, without=["entropies"])
    batch = replace(batch, host_advantages=ADVANTAGES)
    credit = assign_credit(config, batch)  # no entropies and no generator: a step at its limit needs neither
    expected = torch.where(batch.response_mask, ADVANTAGES[:, None], 0.0)
    assert credit.dtype == torch.float32 and torch.equal(credit, expected)


@pytest.mark.parametrize(
    ("config", "scope"),
    [
        ("grpo", "token"),  # the host computes it
        ("dr_grpo", "group"),
        ("w_reinforce", "response"),
        ("hapo", "group"),
        ({"hapo": {"stats": "response"}}, "response"),
        ({"hapo": {"stats": "response", "renorm": "polarity"}}, "group"),
        ({"hapo": {"stats": "batch"}}, "batch"),
        ("entropy_advantage", "token"),
        ("forking_tokens", "batch"),
        ("phr", "group"),
        ({"phr": {"normalize": "selected"}}, "batch"),
        ("grpo + w_reinforce", "response"),
        (["group_normalized", {"top_entropy": {"keep": 1.0}}], "token"),  # at its limit it does nothing
    ],
)
def test_scope(config: Any, scope: str) -> None:
    assert Pipeline.parse(config).scope == scope


def test_draws_and_generators() -> None:
    noisy = Pipeline.of("group_centered", "shuffle_within_response")
    assert noisy.draws and not get_pipeline("hapo").draws
    assert not Pipeline.of("group_centered", {"random_mask": {"keep": 1.0}}).draws
    with pytest.raises(TokenCreditError, match="shuffle_within_response draws random numbers") as caught:
        assign_credit(noisy, small())
    assert "generator=" in str(caught.value.hint)
    assign_credit(noisy, small(), generator=generator("draws"))


# --- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("grpoo", r"unknown credit method 'grpoo', did you mean 'grpo'\? available: a3po, "),
        ("0.5 * grpo + 0.5 * hapoo", "unknown credit method 'hapoo', did you mean 'hapo'"),
        ("grpo - hapo", "cannot read 'grpo - hapo' in the credit expression"),
        ("", "cannot read ''"),
        ("e * grpo", "'e' is not a finite weight"),
        ("1e999 * grpo", "'1e999' is not a finite weight"),
        (None, "a credit pipeline is a name, a list of steps or a weighted sum, got None"),
        ([], r"a credit pipeline is a name, .* got \[\]"),
        (7, "got 7"),
        ({"a": 1, "b": 2}, "a credit pipeline is a name"),
        ({"hapo": 0.3}, "hyperparameters of hapo are a mapping, got 0.3"),
        ({"hapo": ["alpha"]}, "hyperparameters of hapo are a mapping"),
        ({"hapoo": {}}, "unknown credit method 'hapoo'"),
        (["group_normalized", {"entropy_capacity": 0}], "hyperparameters of entropy_capacity are a mapping, got 0"),
        (["group_normalized", {"entropy_capacity": {}, "reverse": {}}], "a step is a name or {name: hyperparameters}"),
        (
            ["group_normalized", "entropy_capacty"],
            "unknown transform 'entropy_capacty', did you mean 'entropy_capacity'",
        ),
        (["group_normalized", ["reverse"]], "unknown transform"),
        (["group_normalized", 3], "unknown transform '3'"),
        (["group_normalised"], "unknown estimator 'group_normalised', did you mean 'group_normalized'"),
        (["entropy_capacity"], "a pipeline starts with an estimator, got the transform 'entropy_capacity'"),
        ({"weighted_sum": []}, "`weighted_sum` is a list"),
        ({"weighted_sum": 3}, "`weighted_sum` is a list"),
        ({"weighted_sum": [{"credit": "grpo"}]}, "has the keys weight and credit"),
        ({"weighted_sum": [{"weight": "much", "credit": "grpo"}]}, "'much' is not a finite weight"),
        ({"weighted_sum": [{"weight": math.inf, "credit": "grpo"}]}, "inf is not a finite weight"),
        ({"hapo": {"alhpa": 1}}, "hapo has no hyperparameter 'alhpa'; accepted: alpha, alpha_negative, eps, phi"),
        (
            ["group_normalized", {"top_entropy": {"kep": 0.3}}],
            "top_entropy has no hyperparameter 'kep', did you mean 'keep'. accepted: keep, normalize, select",
        ),
        (["group_normalized", {"reverse": {"x": 1}}], r"reverse has no hyperparameter 'x'; accepted: \(none\)"),
        (["group_normalized", {"top_entropy": {"keep": 1.5}}], r"`keep` of top_entropy must be in \(0, 1\], got 1.5"),
        (["group_normalized", {"top_entropy": {"keep": 0}}], r"must be in \(0, 1\], got 0"),
        (
            ["group_normalized", {"top_entropy": {"normalize": "some"}}],
            r"must be one of \['all', 'selected'\], got 'some'",
        ),
        (["group_normalized", {"top_entropy": {"keep": "0.3"}}], "`keep` of top_entropy must be a number, got '0.3'"),
        (["group_normalized", {"top_entropy": {"keep": True}}], "must be a number, got True"),
        (["group_normalized", {"entropy_capacity": {"alpha": math.nan}}], "must be a number, got nan"),
        (
            ["group_normalized", {"entropy_capacity": {"signed": 1}}],
            "`signed` of entropy_capacity must be true or false",
        ),
        (["group_normalized", {"shuffle_within_response": {"bins": 2.5}}], "must be a whole number, got 2.5"),
        (["group_normalized", {"shuffle_within_response": {"bins": 0}}], r"must be in \[1, inf\), got 0"),
        (["group_normalized", "no_such_module:fn"], "cannot load the step 'no_such_module:fn': No module named"),
        (["group_normalized", "test_credit:nothing"], "cannot load the step 'test_credit:nothing'"),
        (["group_normalized", "test_credit:needs_strength"], "test_credit:needs_strength needs `strength`"),
    ],
)
def test_what_is_wrong_is_named(config: Any, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message) as caught:
        Pipeline.parse(config)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (too_narrow, r"test_credit:too_narrow must return \[2, 2\], got \[2, 1\]"),
        (explodes, "test_credit:explodes gave nan at row 0, token 0"),
    ],
)
def test_the_second_gate_names_the_step(step: Any, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        assign_credit(Pipeline.of("group_centered", step), small())


def test_hosts_advantages_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TokenCreditError, match=r"`host_advantages` must be finite .*, got inf at row 1"):
        assign_credit("grpo", small(host_advantages=torch.tensor([0.0, math.inf])))


def test_get_pipeline_names_what_it_does_not_know() -> None:
    with pytest.raises(TokenCreditError, match="unknown credit method 'hapo2', did you mean 'hapo'"):
        get_pipeline("hapo2", alpha=0.3)


# --- third parties


def tenfold(advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, factor: float = 10.0) -> Tensor:
    """Tenfold credit."""
    return advantages * factor


def always_one(batch: TokenBatch) -> Tensor:
    """One everywhere."""
    return torch.ones(batch.response_mask.shape)


THEIR_TRANSFORM = MethodSpec(fn=tenfold, paper="-", limits=(Limit({"factor": 1.0}),))
THEIR_ESTIMATOR = MethodSpec(fn=always_one, paper="-")
THEIR_PRESET = ["always_one", "tenfold", "test_credit:halve"]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the named attributes of this module the entry points of an installed package."""
    cached = (tables.estimators, tables.transforms, tables.presets)

    def installed(**points: str) -> None:
        found = [
            EntryPoint(name=name, value=f"test_credit:{attribute}", group=f"tokencredit.{kind}")
            for kind, pair in points.items()
            for name, attribute in [pair.split("=")]
        ]
        monkeypatch.setattr(tables, "entry_points", lambda group: [p for p in found if p.group == group])
        for table in cached:
            table.cache_clear()

    yield installed
    monkeypatch.undo()
    for table in cached:
        table.cache_clear()


def test_installed_packages_add_rows(install: Any) -> None:
    install(
        estimators="always_one=THEIR_ESTIMATOR", transforms="tenfold=THEIR_TRANSFORM", presets="theirs=THEIR_PRESET"
    )
    assert credit_of("theirs") == [[5.0, 5.0], [5.0, 5.0]]  # 1 * 10 / 2
    assert credit_of(get_pipeline("theirs", factor=4.0, divisor=8.0)) == [[0.5, 0.5], [0.5, 0.5]]
    assert Pipeline.of("group_normalized", {"tenfold": {"factor": 1.0}}).is_identity
    with pytest.raises(TokenCreditError, match="did you mean 'theirs'"):
        get_pipeline("their")
    assert "tenfold" not in TRANSFORMS and "always_one" not in ESTIMATORS and "theirs" not in PRESETS


def test_installed_packages_cannot_take_a_name(install: Any) -> None:
    install(transforms="reverse=THEIR_TRANSFORM")
    with pytest.raises(TokenCreditError, match="takes the name 'reverse', which tokencredit has"):
        tables.transforms()


def test_installed_packages_must_bring_a_row(install: Any) -> None:
    install(transforms="tenfold=tenfold")
    with pytest.raises(TokenCreditError, match="test_credit:tenfold must be a MethodSpec, got function"):
        tables.transforms()


# --- seeds


def test_seeds_are_typed_and_stable() -> None:
    assert derive("1") != derive(1) and derive("a", "b") != derive("ab") and derive(1, 23) != derive(12, 3)
    # generated with hashlib.blake2b(b"str:countdown\x1fint:17", digest_size=8), shifted right by one
    assert derive("countdown", 17) == 397737353448867136
    assert all(0 <= derive("x", i) < 2**63 for i in range(100))
    a, b = (torch.rand(4, generator=generator("stream", i)) for i in range(2))
    assert not torch.equal(a, b) and torch.equal(a, torch.rand(4, generator=generator("stream", 0)))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_batches_without_a_token(name: str) -> None:
    full = make_batch(seed=2, host_advantages=True)
    for width in (0, 3):  # every response empty: no column at all, or columns of padding
        cut = {key: value[:, :width] if value.ndim > 1 else value for key, value in full.tensors().items()}
        empty = replace(full, **cut | {"response_mask": torch.zeros(len(full.rewards), width, dtype=torch.bool)})
        found = assign_credit(name, empty, generator=torch.Generator().manual_seed(1))
        assert found.shape == (len(full.rewards), width) and not found.any()


# --- presets begin a pipeline


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (["hapo", "reverse"], ["group_normalized", "entropy_capacity", "reverse"]),
        (["grpo", "test_credit:halve"], ["group_normalized", "test_credit:halve"]),
        ([{"hapo": {"alpha": 0.5}}, "reverse"], ["group_normalized", {"entropy_capacity": {"alpha": 0.5}}, "reverse"]),
        ([{"hapo": None}], "hapo"),
        (["success_trie", "reverse"], [{"success_trie": {}}, {"reverse": {}}]),
        ([["grpo", "reverse"]], None),
        (
            ["0.5 * dr_grpo + rloo", {"test_credit:halve": {"divisor": 4.0}}],
            {
                "weighted_sum": [
                    {"weight": 0.5, "credit": ["group_centered", {"test_credit:halve": {"divisor": 4.0}}]},
                    {"weight": 1.0, "credit": ["leave_one_out", {"test_credit:halve": {"divisor": 4.0}}]},
                ]
            },
        ),
        (
            [{"weighted_sum": [{"weight": 2, "credit": "grpo"}]}, "reverse"],
            {"weighted_sum": [{"weight": 2.0, "credit": ["grpo", "reverse"]}]},
        ),
        ({"test_credit:outcome_of_mine": {"level": 2.0}}, [{"test_credit:outcome_of_mine": {"level": 2.0}}]),
    ],
)
def test_a_preset_can_start_a_list_of_steps(config: Any, same: Any) -> None:
    if same is None:
        with pytest.raises(TokenCreditError, match="unknown estimator"):
            Pipeline.parse(config)
        return
    pipeline = Pipeline.parse(config)
    written = json.loads(json.dumps(pipeline.to_config()))
    assert pipeline.to_config() == Pipeline.parse(same).to_config()
    assert Pipeline.parse(written).to_config() == pipeline.to_config()
    assert Pipeline.of(get_pipeline("hapo"), "reverse").to_config() == Pipeline.parse(["hapo", "reverse"]).to_config()


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            ["group_normalized", "hapo"],
            r"'hapo' can only start .* \(group_normalized → entropy_capacity\)",
            "write it first",
        ),
        (["group_normalized", "group_centered"], "'group_centered' can only start a pipeline", "write it first"),
        (["hapoo", "reverse"], "unknown estimator 'hapoo', did you mean 'hapo'", None),
        ("reverse", "a pipeline starts with an estimator, got the transform 'reverse'", "group_normalized"),
        ({"reverse": {}}, "a pipeline starts with an estimator, got the transform 'reverse'", "group_normalized"),
        (
            ["test_credit:halve"],
            "an estimator is called as .*batch.*, but test_credit:halve takes .*advantages",
            "start the",
        ),
        ("test_credit:halve", "an estimator is called as", "start the pipeline with"),
        (
            ["grpo", "test_credit:outcome_of_mine"],
            "a transform is called as .*advantages, batch",
            "test_credit:outcome",
        ),
        (["grpo", "math:pi"], "the step must be a function, but 'math:pi' is a float", None),
        (
            ["tokencredit.pipeline.pipeline:Pipeline"],
            "a step is a function, but tokencredit.pipeline.pipeline:Pipeline is a class",
            None,
        ),
        ([()], r"a step is \(function, hyperparameters\), got \(\)", None),
        ([int], "a step is a function, but builtins:int is a class", None),
        (b"grpo", "a credit pipeline is a name", None),
        (bytearray(b"grpo"), "a credit pipeline is a name", None),
        ({1: {}}, "unknown estimator '1'", None),
        ({"hapo": {"name": 3}}, "hapo has no hyperparameter 'name'", None),
        ({"hapo": {1: 3}}, "hapo has no hyperparameter 1", None),
        ({"hapo": {"alpha": 10**400}}, "`alpha` of entropy_capacity must be a number", None),
        ("9" * 10_000, "unknown credit method '999", None),
        ("1e300 * grpo + 10 * 3", "unknown credit method '3'", None),
        ({"weighted_sum": [{"weight": 1e300, "credit": "1e300 * grpo"}]}, "is not a finite weight", None),
        ({"weighted_sum": [{"weight": True, "credit": "grpo"}]}, "True is not a finite weight", None),
        ({"weighted_sum": "grpo"}, "`weighted_sum` is a list", None),
    ],
)
def test_what_cannot_be_composed_says_why(config: Any, message: str, hint: str | None) -> None:
    with pytest.raises(TokenCreditError, match=message) as caught:
        Pipeline.parse(config)
    assert "\n" not in caught.value.message and len(caught.value.message) < 4_000
    assert hint is None or hint in (caught.value.hint or "")


def test_a_config_that_contains_itself_is_refused() -> None:
    term: dict[str, Any] = {"weight": 1.0}
    term["credit"] = {"weighted_sum": [term]}
    with pytest.raises(TokenCreditError, match="nested too deeply"):
        Pipeline.parse({"weighted_sum": [term]})


@pytest.mark.parametrize("field", ["requires", "scope"])
def test_what_a_function_says_of_itself_is_checked(field: str) -> None:
    def mine(advantages: Tensor, batch: TokenBatch) -> Tensor:
        return advantages

    setattr(mine, field, "entropy" if field == "requires" else "everything")
    message = "did you mean 'entropies'" if field == "requires" else "`scope` of .*mine must be one of"
    with pytest.raises(TokenCreditError, match=message):
        Pipeline.of("grpo", mine)


def test_sums_and_products_refuse_what_is_no_pipeline_or_number() -> None:
    for weight in (math.nan, math.inf, True, "much", None):
        with jaxtyped(False), pytest.raises(TokenCreditError, match="is not a finite weight"):
            get_pipeline("grpo") * weight  # type: ignore[operator]
    with jaxtyped(False), pytest.raises(TypeError):
        get_pipeline("grpo") + "hapo"  # type: ignore[operator]
    with pytest.raises(TokenCreditError, match="at least one step"):
        Pipeline.of()


# --- what the door takes


def test_hyperparameters_at_the_door() -> None:
    batch = make_batch()
    by_name = assign_credit("hapo", batch, alpha=0.3, **{"entropy_capacity.phi": 3.0})
    assert torch.equal(by_name, assign_credit(get_pipeline("hapo", alpha=0.3, phi=3.0), batch))
    with pytest.raises(TokenCreditError, match=r"hyperparameters alpha can only be given with a method's name"):
        assign_credit(["hapo"], batch, alpha=0.3)
    with pytest.raises(TokenCreditError, match="hapo has no hyperparameter 'alhpa'"):
        assign_credit("hapo", batch, alhpa=0.3)


@pytest.mark.parametrize("batch", [{"rewards": [1.0]}, [1.0], None, torch.zeros(2, 2)])
def test_a_batch_of_another_type_is_refused(batch: Any) -> None:
    with jaxtyped(False), pytest.raises(TokenCreditError, match=f"must be a TokenBatch, got {type(batch).__name__}"):
        assign_credit("grpo", batch)
    with jaxtyped(False), pytest.raises(TokenCreditError, match=r"`generator` must be a torch.Generator, got int"):
        assign_credit("grpo", small(), generator=3)  # type: ignore[arg-type]


def returns_a_list(batch: TokenBatch) -> Any:
    return batch.rewards.tolist()


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ("1e39 * grpo", {}, r"1e\+39 \* grpo gave inf at row 0, token 0"),
        ("3e38 * dr_grpo + 3e38 * rloo", {"rewards": torch.tensor([3.0, 0.0])}, "gave inf at row 0"),
        ("3 * grpo", {"host_advantages": torch.tensor([0.0, -3e38])}, "gave -inf at row 1, token 0"),
        ("dr_grpo", {"rewards": torch.tensor([3e38, -3e38], dtype=torch.float64)}, None),
        ("rloo", {"rewards": torch.tensor([3e38, -3e38], dtype=torch.float64)}, "gave inf"),
        (
            ["grpo", {"constant_scale": {"multiplier": 1e308}}],
            {"host_advantages": torch.tensor([1e3, 0.0])},
            "constant_scale gave",
        ),
        ("test_credit:returns_a_list", {}, "test_credit:returns_a_list must return a tensor, got list"),
    ],
)
def test_credit_is_finite_or_refused(config: Any, fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert bool(torch.isfinite(assign_credit(config, small(**fields))).all())
        return
    with jaxtyped(False), pytest.raises(TokenCreditError, match=message):
        assign_credit(config, small(**fields))


def test_the_step_that_broke_first_is_named_and_hides_behind_no_later_one() -> None:
    steps = ["group_centered", explodes, {"constant_scale": {"multiplier": 0.0}}]
    with pytest.raises(TokenCreditError, match="test_credit:explodes gave nan at row 0, token 0"):
        assign_credit(Pipeline.of(*steps), small())
