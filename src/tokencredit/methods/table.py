"""The tables of methods: literal, the same in every process, read by tests, docs, command line and adapters."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.methods.adapter_residual import adapter_residual, residual_fields
from tokencredit.methods.attention.rhythm import answer_attention, attention_rhythm
from tokencredit.methods.attention.weights import (
    attention_blend,
    attention_gate,
    attention_schedule,
    attention_tilt,
    blend_fields,
    keep_attention,
    keep_positions,
    signal_fields,
)
from tokencredit.methods.controls import (
    constant_scale,
    mass_scope,
    match_mass,
    mean_weight,
    mean_within_response,
    random_mask,
    reverse,
    selection_scope,
    shuffle_within_response,
)
from tokencredit.methods.distillation.table import (
    DISTILLATION_ESTIMATORS,
    DISTILLATION_PRESETS,
    DISTILLATION_TRANSFORMS,
)
from tokencredit.methods.entropy.quadrants import keep_quadrants, quadrant_scope
from tokencredit.methods.entropy.rules import (
    capacity_scope,
    empg,
    entropy_bonus,
    entropy_capacity,
    gtpo,
    reward_capacity,
    top_entropy,
)
from tokencredit.methods.exact import exact_advantage
from tokencredit.methods.likelihood import entropy_reduction, policy_divergence, surprisal
from tokencredit.methods.outcome import group_centered, group_normalized, leave_one_out, signed_outcome
from tokencredit.methods.probability import a3po, clip_cov, future_ratio, outcome_importance, probability_scaled, steer
from tokencredit.methods.spec import Limit, MethodSpec
from tokencredit.methods.success_trie import success_trie

ENTROPIES = frozenset({"entropies"})
OLD = frozenset({"old_logprobs"})
FIFTH: dict[str, Any] = {"keep": 0.2, "normalize": "selected"}  # the hard subsets of arXiv:2605.07660
THROUGH: dict[str, Any] = {"place": "through", "normalize": "selected"}
WEIGHT_DOMAINS = {"sharpening": "[0, inf)", "mix": "[0, 1]", "floor": "[0, 1]", "cap": "[1, inf)"}

ESTIMATORS: dict[str, MethodSpec] = {
    "group_normalized": MethodSpec(
        fn=group_normalized,
        in_blocks=True,
        paper="arXiv:2402.03300",
        scope="group",
        domains={"eps": "[0, inf)"},
        is_host_baseline=True,
    ),
    "group_centered": MethodSpec(fn=group_centered, in_blocks=True, paper="arXiv:2503.20783", scope="group"),
    "leave_one_out": MethodSpec(fn=leave_one_out, in_blocks=True, paper="arXiv:2402.14740", scope="group"),
    "signed_outcome": MethodSpec(
        fn=signed_outcome,
        in_blocks=True,
        paper="arXiv:2506.01347",
        scope="response",
        domains={"positive": "[0, inf)", "negative": "[0, inf)"},
    ),
    "exact_advantage": MethodSpec(fn=exact_advantage, paper="-", requires=frozenset({"values"}), scope="response"),
    "success_trie": MethodSpec(fn=success_trie, paper="-", requires=OLD, scope="group", domains={"kappa": "[0, inf)"}),
    **DISTILLATION_ESTIMATORS,
}

TRANSFORMS: dict[str, MethodSpec] = {
    "entropy_capacity": MethodSpec(
        fn=entropy_capacity,
        in_blocks=True,
        paper="arXiv:2604.11056",
        requires=ENTROPIES,
        scope=capacity_scope,
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
        fn=keep_quadrants, paper="arXiv:2604.11056", requires=ENTROPIES, scope=quadrant_scope, keeps_sign=True
    ),
    "top_entropy": MethodSpec(
        fn=top_entropy,
        in_blocks=True,
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
        in_blocks=True,
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
        domains={"half_life": "(0, inf)", "low": "(0, inf)", "high": "(0, inf)", "clip_ratio_c": "[1, inf)"},
        limits=(Limit({"low": 1.0, "high": 1.0}),),
        keeps_sign=True,
    ),
    "surprisal": MethodSpec(
        fn=surprisal,
        in_blocks=True,
        paper="arXiv:2606.00257",
        requires=OLD,
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(Limit({"sharpening": 0.0}), Limit({"mix": 0.0})),
        keeps_sign=True,
    ),
    "entropy_reduction": MethodSpec(
        fn=entropy_reduction,
        paper="arXiv:2606.00257",
        requires=ENTROPIES,
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(Limit({"sharpening": 0.0}), Limit({"mix": 0.0})),
        keeps_sign=True,
    ),
    "policy_divergence": MethodSpec(
        fn=policy_divergence,
        in_blocks=True,
        paper="arXiv:2606.00257",
        requires=OLD | {"ref_logprobs"},
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(Limit({"sharpening": 0.0}), Limit({"mix": 0.0})),
        keeps_sign=True,
    ),
    "adapter_residual": MethodSpec(
        fn=adapter_residual,
        in_blocks=True,
        paper="arXiv:2606.00257",
        requires=residual_fields,
        scope="response",
        domains=WEIGHT_DOMAINS | {"gate": "[0, 2]"},
        limits=(Limit({"sharpening": 0.0}), Limit({"mix": 0.0})),
        keeps_sign=True,
    ),
    "attention_blend": MethodSpec(
        fn=attention_blend,
        paper="arXiv:2605.07660",
        requires=blend_fields,
        scope="batch",
        domains={"tau": "(0, inf)", "warmup_steps": "[1, inf)", "warmup_share": "(0, 1]"},
        limits=(Limit({"low": (1.0, 1.0), "high": (1.0, 1.0)}),),
        keeps_sign=True,
    ),
    "attention_schedule": MethodSpec(
        fn=attention_schedule,
        paper="-",
        requires=signal_fields,
        scope="response",
        domains={"beta": "[0, 1)"},
        limits=(Limit({"beta": 0.0}), Limit({"direction": "uniform"})),
        keeps_sign=True,
    ),
    "attention_tilt": MethodSpec(
        fn=attention_tilt,
        paper="-",
        requires=signal_fields,
        scope="response",
        domains={"kappa": "[0, inf)"},
        limits=(Limit({"kappa": 0.0}), Limit({"direction": "uniform"})),
        keeps_sign=True,
    ),
    "attention_gate": MethodSpec(
        fn=attention_gate,
        paper="-",
        requires=signal_fields,
        scope="response",
        domains={"floor": "(0, 1]", "tau": "(0, inf)"},
        limits=(Limit({"floor": 1.0}),),
        keeps_sign=True,
    ),
    "keep_attention": MethodSpec(
        fn=keep_attention,
        paper="arXiv:2605.07660",
        requires=signal_fields,
        scope=selection_scope,
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "keep_positions": MethodSpec(
        fn=keep_positions,
        paper="-",
        scope=selection_scope,
        domains={"start": "[0, 1]", "stop": "[0, 1]"},
        limits=(Limit({"start": 0.0, "stop": 1.0}),),
        keeps_sign=True,
    ),
    "attention_rhythm": MethodSpec(
        fn=attention_rhythm,
        paper="arXiv:2510.13554",
        requires=frozenset({"attention_distances", "attention_influences"}),
        scope="response",
        domains={"share": "(0, 1]", "gain": "[1, inf)", "alpha": "[0, 1]", "reach": "[1, inf)"},
        limits=(Limit({"gain": 1.0}),),
        keeps_sign=True,
    ),
    "answer_attention": MethodSpec(
        fn=answer_attention,
        paper="-",
        requires=frozenset({"importances"}),
        scope="response",
        domains={"floor": "(0, 1]"},
        limits=(Limit({"floor": 1.0}),),
        keeps_sign=True,
    ),
    "shuffle_within_response": MethodSpec(
        fn=shuffle_within_response, paper="-", scope="response", domains={"bins": "[1, inf)"}, conserves="multiset"
    ),
    "reverse": MethodSpec(fn=reverse, paper="-", scope="response", conserves="multiset"),
    "random_mask": MethodSpec(
        fn=random_mask,
        paper="-",
        scope=selection_scope,
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "constant_scale": MethodSpec(fn=constant_scale, paper="-", limits=(Limit({"scale": 1.0}),)),
    "mean_within_response": MethodSpec(fn=mean_within_response, paper="-", scope="response"),
    "mean_weight": MethodSpec(fn=mean_weight, paper="-", scope="batch"),
    "match_mass": MethodSpec(fn=match_mass, paper="-", scope=mass_scope, keeps_sign=True, conserves="mass"),
    **DISTILLATION_TRANSFORMS,
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
    "surprisal": ["group_normalized", "surprisal"],
    "entropy_reduction": ["group_normalized", "entropy_reduction"],
    "policy_divergence": ["group_normalized", "policy_divergence"],
    "arca": ["group_normalized", {"adapter_residual": {"sharpening": 1.0}}],
    "arca_released": ["group_normalized", {"adapter_residual": {"sharpening": 2.0}}],
    # arXiv:2605.07660 as published, then the same with the size of its step taken away, then alone.
    "attention": ["group_normalized", {"attention_blend": {"direction": "low_to_high"}}],
    "attention_high_to_low": ["group_normalized", {"attention_blend": {"direction": "high_to_low"}}],
    "static_anchor": ["group_normalized", {"attention_blend": {"direction": "static_anchor"}}],
    "static_explorer": ["group_normalized", {"attention_blend": {"direction": "static_explorer"}}],
    "attention_mass_per_response": ["group_normalized", "attention_blend", {"match_mass": {"per": "response"}}],
    "attention_mass_per_batch": ["group_normalized", "attention_blend", {"match_mass": {"per": "batch"}}],
    "attention_mean_weight": ["group_normalized", "attention_blend", "mean_weight"],
    "attention_rank_linear": ["group_normalized", {"attention_schedule": {"beta": 0.5, "direction": "low_to_high"}}],
    "attention_tilt": ["group_normalized", "attention_tilt"],
    "attention_gate": ["group_normalized", "attention_gate"],
    "anchors": ["group_normalized", {"keep_attention": FIFTH | {"side": "low"}}],
    "explorers": ["group_normalized", {"keep_attention": FIFTH | {"side": "high"}}],
    "predictive_low": ["group_normalized", {"keep_attention": FIFTH | {"side": "low", "signal": "predictive"}}],
    "predictive_high": ["group_normalized", {"keep_attention": FIFTH | {"side": "high", "signal": "predictive"}}],
    "random_tokens": ["group_normalized", {"random_mask": FIFTH}],
    "first_fifth": ["group_normalized", {"keep_positions": {"stop": 0.2} | THROUGH}],
    "last_fifth": ["group_normalized", {"keep_positions": {"start": 0.8} | THROUGH}],
    "front_half": ["group_normalized", {"keep_positions": {"stop": 0.5, "normalize": "selected"}}],
    "back_half": ["group_normalized", {"keep_positions": {"start": 0.5, "normalize": "selected"}}],
    "attention_illuminates": ["group_normalized", "attention_rhythm"],
    "atpo": ["group_normalized", "answer_attention"],
    "exact": ["exact_advantage"],
    "success_trie": ["success_trie"],
    **DISTILLATION_PRESETS,
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
