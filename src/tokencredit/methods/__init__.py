"""The tables of methods: literal, the same in every process, read by tests, docs, command line and adapters."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.methods.controls import (
    constant_scale,
    match_mass,
    mean_within_response,
    random_mask,
    reverse,
    shuffle_within_response,
)
from tokencredit.methods.entropy import empg, entropy_bonus, entropy_capacity, gtpo, reward_capacity, top_entropy
from tokencredit.methods.outcome import group_centered, group_normalized, leave_one_out, signed_outcome
from tokencredit.methods.quadrants import keep_quadrants
from tokencredit.methods.rules import a3po, clip_cov, future_ratio, outcome_importance, probability_scaled, steer
from tokencredit.methods.spec import Limit, MethodSpec

ENTROPIES = frozenset({"entropies"})
OLD = frozenset({"old_logprobs"})

ESTIMATORS: dict[str, MethodSpec] = {
    "group_normalized": MethodSpec(
        fn=group_normalized, paper="arXiv:2402.03300", scope="group", domains={"eps": "[0, inf)"}
    ),
    "group_centered": MethodSpec(fn=group_centered, paper="arXiv:2503.20783", scope="group"),
    "leave_one_out": MethodSpec(fn=leave_one_out, paper="arXiv:2402.14740", scope="group"),
    "signed_outcome": MethodSpec(
        fn=signed_outcome,
        paper="arXiv:2506.01347",
        scope="response",
        domains={"positive": "[0, inf)", "negative": "[0, inf)"},
    ),
}

TRANSFORMS: dict[str, MethodSpec] = {
    "entropy_capacity": MethodSpec(
        fn=entropy_capacity,
        paper="arXiv:2604.11056",
        requires=ENTROPIES,
        scope="group",
        domains={"phi": "(0, inf)"},
        limits=(Limit({"alpha": 0.0, "alpha_negative": None}),),
        keeps_sign=True,
    ),
    "reward_capacity": MethodSpec(
        fn=reward_capacity,
        paper="-",
        requires=ENTROPIES,
        scope="group",
        limits=(Limit({"alpha": 0.0}),),
        keeps_sign=True,
    ),
    "keep_quadrants": MethodSpec(
        fn=keep_quadrants, paper="arXiv:2604.11056", requires=ENTROPIES, scope="group", keeps_sign=True
    ),
    "top_entropy": MethodSpec(
        fn=top_entropy,
        paper="arXiv:2506.01939",
        requires=ENTROPIES,
        scope="batch",
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "entropy_bonus": MethodSpec(
        fn=entropy_bonus,
        paper="arXiv:2506.14758",
        requires=ENTROPIES,
        domains={"alpha": "[0, inf)", "kappa": "(0, inf)"},
        limits=(Limit({"alpha": 0.0}),),
        keeps_sign=True,
    ),
    "gtpo": MethodSpec(
        fn=gtpo,
        paper="arXiv:2508.04349",
        requires=ENTROPIES,
        scope="group",
        domains={"base_share": "[0, 1]", "floor": "(0, inf)"},
    ),
    "empg": MethodSpec(
        fn=empg,
        paper="arXiv:2509.09265",
        requires=ENTROPIES,
        scope="batch",
        limits=(Limit({"k": 0.0, "zeta": 0.0, "center": False}),),
    ),
    "probability_scaled": MethodSpec(
        fn=probability_scaled,
        paper="arXiv:2505.12929",
        requires=OLD,
        domains={"alpha": "[0, 1]"},
        limits=(Limit({"alpha": 0.0}),),
        keeps_sign=True,
    ),
    "steer": MethodSpec(
        fn=steer,
        paper="arXiv:2510.10150",
        requires=ENTROPIES | OLD,
        scope="batch",
        domains={"least": "(0, 1]", "floor": "(0, inf)"},
        limits=(Limit({"least": 1.0}),),
        keeps_sign=True,
    ),
    "clip_cov": MethodSpec(
        fn=clip_cov,
        paper="arXiv:2505.22617",
        requires=OLD,
        scope="batch",
        domains={"share": "[0, 1]"},
        limits=(Limit({"share": 0.0}),),
        keeps_sign=True,
    ),
    "a3po": MethodSpec(
        fn=a3po,
        paper="arXiv:2512.21625",
        requires=OLD,
        scope="response",
        domains={"share": "[0, 1]", "until": "(0, inf)", "gain": "(0, inf)"},
        limits=(Limit({"gain": 1.0}),),
        keeps_sign=True,
    ),
    "outcome_importance": MethodSpec(
        fn=outcome_importance,
        paper="OAR (ACL 2026)",
        requires=frozenset({"importances"}),
        scope="response",
        domains={"tau": "[0, 1]", "beta": "[0, inf)"},
        keeps_sign=True,
    ),
    "future_ratio": MethodSpec(
        fn=future_ratio,
        paper="arXiv:2603.19835",
        requires=OLD | {"current_logprobs"},
        scope="response",
        domains={"half_life": "(0, inf)", "low": "(0, inf)", "high": "(0, inf)"},
        limits=(Limit({"low": 1.0, "high": 1.0}),),
        keeps_sign=True,
    ),
    "shuffle_within_response": MethodSpec(
        fn=shuffle_within_response, paper="-", scope="response", domains={"bins": "[1, inf)"}, conserves="multiset"
    ),
    "reverse": MethodSpec(fn=reverse, paper="-", scope="response", conserves="multiset"),
    "random_mask": MethodSpec(
        fn=random_mask,
        paper="-",
        scope="response",
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "constant_scale": MethodSpec(fn=constant_scale, paper="-", limits=(Limit({"scale": 1.0}),)),
    "mean_within_response": MethodSpec(fn=mean_within_response, paper="-", scope="response"),
    "match_mass": MethodSpec(fn=match_mass, paper="-", scope="group", keeps_sign=True, conserves="mass"),
}

PRESETS: dict[str, list[Any]] = {
    "grpo": ["group_normalized"],
    "dr_grpo": ["group_centered"],
    "rloo": ["leave_one_out"],
    "w_reinforce": ["signed_outcome"],
    "psr": [{"signed_outcome": {"positive": 1.0, "negative": 0.0}}],
    "nsr": [{"signed_outcome": {"positive": 0.0, "negative": 1.0}}],
    "hapo": ["group_normalized", {"entropy_capacity": {"alpha": 0.2, "phi": 2.0}}],
    "hapo_balanced": ["group_normalized", {"entropy_capacity": {"alpha": 0.2, "phi": 2.0, "renorm": "polarity"}}],
    "high_entropy_quadrants": ["group_normalized", {"keep_quadrants": {"quadrants": ["PHR", "NHR"]}}],
    "phr": ["group_normalized", {"keep_quadrants": {"quadrants": ["PHR"]}}],
    "plr": ["group_normalized", {"keep_quadrants": {"quadrants": ["PLR"]}}],
    "nhr": ["group_normalized", {"keep_quadrants": {"quadrants": ["NHR"]}}],
    "nlr": ["group_normalized", {"keep_quadrants": {"quadrants": ["NLR"]}}],
    "forking_tokens": ["group_normalized", {"top_entropy": {"keep": 0.2, "normalize": "selected"}}],
    "entropy_advantage": ["group_normalized", {"entropy_bonus": {"alpha": 0.4, "kappa": 2.0}}],
    "gtpo": ["group_normalized", "gtpo"],
    "empg": ["group_normalized", "empg"],
    "advantage_reweighting": ["group_normalized", "probability_scaled"],
    "steer": ["group_normalized", "steer"],
    "clip_cov": ["group_normalized", "clip_cov"],
    "a3po": ["group_normalized", "a3po"],
    "fipo": ["group_normalized", "future_ratio"],
}


@cache
def estimators() -> Mapping[str, MethodSpec]:
    """`ESTIMATORS` and those of installed packages (entry-point group `tokencredit.estimators`)."""
    return ESTIMATORS | _third_party("estimators", ESTIMATORS, MethodSpec)


@cache
def transforms() -> Mapping[str, MethodSpec]:
    """`TRANSFORMS` and those of installed packages (entry-point group `tokencredit.transforms`)."""
    return TRANSFORMS | _third_party("transforms", TRANSFORMS, MethodSpec)


@cache
def presets() -> Mapping[str, list[Any]]:
    """`PRESETS` and those of installed packages (entry-point group `tokencredit.presets`)."""
    return PRESETS | _third_party("presets", PRESETS, list)


def _third_party(kind: str, ours: Mapping[str, Any], expected: type) -> dict[str, Any]:
    found = {}
    for point in entry_points(group=f"tokencredit.{kind}"):
        if point.name in ours:
            raise TokenCreditError(
                f"{point.value} takes the name {point.name!r}, which tokencredit has", hint="rename the entry point"
            )
        loaded = point.load()
        if not isinstance(loaded, expected):
            raise TokenCreditError(f"{point.value} must be a {expected.__name__}, got {type(loaded).__name__}")
        found[point.name] = loaded
    return found
