"""The rows of the tables for distillation and self-distillation; `methods/__init__.py` takes them in."""

from collections.abc import Mapping
from typing import Any

from tokencredit.methods.distillation.log_ratio import (
    lambda_discrepancy,
    prefix_discrepancy,
    prefix_ratio,
    reordered_discrepancy,
    teacher_confidence,
    teacher_log_ratio,
)
from tokencredit.methods.distillation.self_distillation import (
    CONSTANT,
    add_teacher_gap,
    antisd,
    directed_self_distillation,
    randomly_directed_self_distillation,
    rlrt,
    rlsd,
    rlsd_fields,
    srpo,
)
from tokencredit.methods.position import middle_mask, position_decay, prefix_boost, prefix_mask, suffix_mask
from tokencredit.methods.spec import Limit, MethodSpec, Scope

IW_OPD = "arXiv:2606.22600"
DASD = "arXiv:2605.22263"
GAP = frozenset({"teacher_logprobs", "old_logprobs"})


def _ratio_requires(given: Mapping[str, Any]) -> frozenset[str]:
    return GAP if given["lam"] == 1.0 else GAP | {"ref_logprobs"}


def _direction_requires(given: Mapping[str, Any]) -> frozenset[str]:
    return GAP if given["direction"] in (*CONSTANT, "position", "surprisal") else GAP | {"entropies"}


def _direction_scope(given: Mapping[str, Any]) -> Scope:
    if given["gap_scale"] == "batch_mean_abs":
        return "batch"
    return "group" if given["zero_spread"] == "drop" else "response"


def _switch_requires(given: Mapping[str, Any]) -> frozenset[str]:
    return GAP if given["h_warm"] is None else GAP | {"teacher_entropies"}


def _switch_scope(given: Mapping[str, Any]) -> Scope:
    return "token" if given["h_warm"] is None else "batch"


def _order_scope(given: Mapping[str, Any]) -> Scope:
    return "batch" if given["order"] == "borrowed" else "response"


DISTILLATION_ESTIMATORS: dict[str, MethodSpec] = {
    "teacher_log_ratio": MethodSpec(
        fn=teacher_log_ratio, paper="OPD; ExOPD arXiv:2602.12125", requires=_ratio_requires, domains={"lam": "[0, inf)"}
    ),
}

DISTILLATION_TRANSFORMS: dict[str, MethodSpec] = {
    "prefix_discrepancy": MethodSpec(
        fn=prefix_discrepancy,
        paper=IW_OPD,
        requires=GAP,
        scope="response",
        domains={"gamma": "[0, inf)"},
        limits=(Limit({"gamma": 0.0, "floor": True}),),
        keeps_sign=True,
    ),
    "lambda_discrepancy": MethodSpec(
        fn=lambda_discrepancy,
        paper=IW_OPD,
        requires=GAP | {"ref_logprobs"},
        scope="response",
        domains={"gamma": "[0, inf)"},
        limits=(Limit({"gamma": 0.0}),),
    ),
    "reordered_discrepancy": MethodSpec(
        fn=reordered_discrepancy,
        paper="-",
        requires=GAP,
        scope=_order_scope,
        domains={"gamma": "[0, inf)"},
        limits=(Limit({"gamma": 0.0}),),
        keeps_sign=True,
    ),
    "prefix_ratio": MethodSpec(
        fn=prefix_ratio,
        paper=IW_OPD,
        requires=GAP,
        scope="batch",
        domains={"alpha": "[0, inf)", "gamma": "[0, inf)"},
        limits=(Limit({"alpha": 0.0, "blend": False}),),
        keeps_sign=True,
    ),
    "teacher_confidence": MethodSpec(
        fn=teacher_confidence,
        paper=IW_OPD,
        requires=frozenset({"teacher_logprobs"}),
        scope="response",
        domains={"window": "[1, inf)", "q": "[0, 1]", "alpha": "[0, inf)", "w_min": "[0, 1]"},
        limits=(Limit({"alpha": 0.0}),),
        keeps_sign=True,
    ),
    "position_decay": MethodSpec(
        fn=position_decay,
        paper="-",
        scope="response",
        domains={"gamma": "[0, inf)"},
        limits=(Limit({"gamma": 0.0}),),
        keeps_sign=True,
    ),
    "prefix_mask": MethodSpec(
        fn=prefix_mask,
        paper=IW_OPD,
        scope="response",
        domains={"keep": "(0, 1]", "keep_end": "(0, 1]"},
        limits=(Limit({"keep": 1.0, "schedule": "none"}),),
        keeps_sign=True,
    ),
    "suffix_mask": MethodSpec(
        fn=suffix_mask,
        paper=IW_OPD,
        scope="response",
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "middle_mask": MethodSpec(
        fn=middle_mask,
        paper="-",
        scope="response",
        domains={"keep": "(0, 1]"},
        limits=(Limit({"keep": 1.0}),),
        keeps_sign=True,
    ),
    "prefix_boost": MethodSpec(
        fn=prefix_boost,
        paper=IW_OPD,
        scope="response",
        domains={"keep": "(0, 1]", "keep_end": "(0, 1]", "multiplier": "[0, inf)"},
        limits=(Limit({"multiplier": 1.0}),),
        keeps_sign=True,
    ),
    "directed_self_distillation": MethodSpec(
        fn=directed_self_distillation,
        paper=DASD,
        requires=_direction_requires,
        scope=_direction_scope,
        domains={"beta": "[0, inf)", "rho": "[0, 1]", "cap": "(0, inf)", "skip_first": "[0, inf)"},
        limits=(Limit({"beta": 0.0}),),
    ),
    "randomly_directed_self_distillation": MethodSpec(
        fn=randomly_directed_self_distillation,
        paper="-",
        requires=GAP | {"entropies"},
        scope="response",
        domains={"beta": "[0, inf)", "rho": "[0, 1]", "cap": "(0, inf)"},
        limits=(Limit({"beta": 0.0}),),
    ),
    "add_teacher_gap": MethodSpec(
        fn=add_teacher_gap, paper="arXiv:2605.11609 (+SD)", requires=GAP, limits=(Limit({"lam": 0.0}),)
    ),
    "rlsd": MethodSpec(
        fn=rlsd,
        paper="arXiv:2604.03128",
        requires=rlsd_fields,
        domains={
            "lam": "[0, 1]",
            "lam_end": "[0, 1]",
            "eps": "[0, 1]",
            "warmup": "[0, 1]",
            "decay_steps": "[1, inf)",
        },
        limits=(Limit({"lam": 0.0, "lam_end": 0.0}), Limit({"lam": 0.0, "lam_end": None})),
        keeps_sign=True,
        renamed={"form": {"released": "product", "paper": "minimum"}},
    ),
    "rlrt": MethodSpec(
        fn=rlrt,
        paper="arXiv:2605.10781",
        requires=GAP,
        domains={"lam": "[0, 1]", "eps": "[0, 1]"},
        limits=(Limit({"lam": 0.0}),),
        keeps_sign=True,
    ),
    "srpo": MethodSpec(
        fn=srpo,
        paper="arXiv:2604.02288",
        requires=GAP | {"teacher_entropies"},
        scope="batch",
        domains={"beta": "[0, inf)"},
    ),
    "antisd": MethodSpec(
        fn=antisd,
        paper="arXiv:2605.11609",
        requires=_switch_requires,
        scope=_switch_scope,
        domains={"lam": "[0, inf)", "g": "[0, 1]", "h_warm": "(0, inf)"},
        limits=(Limit({"lam": 0.0}), Limit({"g": 0.0})),
    ),
}

DISTILLATION_PRESETS: dict[str, list[Any]] = {
    "opd": ["teacher_log_ratio"],
    "exopd": [{"teacher_log_ratio": {"lam": 1.25}}],
    "iw_opd": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5}}],
    "iw_exopd": [{"teacher_log_ratio": {"lam": 1.25}}, {"prefix_discrepancy": {"gamma": 0.5}}],
    "iw_exopd_lambda": [{"teacher_log_ratio": {"lam": 1.25}}, {"lambda_discrepancy": {"gamma": 0.5}}],
    "iw_opd_paper": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "denominator": "drop_last"}}],
    "iw_opd_signed": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "discrepancy": "signed"}}],
    "iw_opd_surrogate": ["teacher_log_ratio", {"prefix_discrepancy": {"floor": False}}],
    "iw_opd_unit_mass": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "scale": "unit_mass"}}],
    "iw_opd_shuffled": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "shuffled"}}],
    "iw_opd_reversed": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "reversed"}}],
    "iw_opd_borrowed": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "borrowed"}}],
    "iw_opd_constant": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "constant"}}],
    "opd_scaled": ["teacher_log_ratio", {"constant_scale": {"scale": 1.25}}],
    "opd_ratio": ["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.001}}],
    "opd_ratio_blend": ["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.001, "blend": True}}],
    "opd_confidence": ["teacher_log_ratio", "teacher_confidence"],
    "opd_decay": ["teacher_log_ratio", {"position_decay": {"gamma": 0.5}}],
    "opd_prefix": ["teacher_log_ratio", {"prefix_mask": {"keep": 0.3}}],
    "opd_suffix": ["teacher_log_ratio", {"suffix_mask": {"keep": 0.3}}],
    "opd_middle": ["teacher_log_ratio", {"middle_mask": {"keep": 0.3}}],
    "opd_random": ["teacher_log_ratio", {"random_mask": {"keep": 0.3}}],
    "opd_boost": ["teacher_log_ratio", {"prefix_boost": {"keep": 0.3, "multiplier": 1.5}}],
    "opd_curriculum": ["teacher_log_ratio", {"prefix_boost": {"keep": 0.3, "multiplier": 1.5, "schedule": "cosine"}}],
    "dasd": ["group_normalized", {"directed_self_distillation": {"beta": 0.1, "rho": 0.2}}],
    "dasd_bottom": ["group_normalized", {"directed_self_distillation": {"tail": "bottom"}}],
    "dasd_conformity": ["group_normalized", {"directed_self_distillation": {"direction": "conformity"}}],
    "dasd_novelty": ["group_normalized", {"directed_self_distillation": {"direction": "novelty"}}],
    "dasd_flipped": ["group_normalized", {"directed_self_distillation": {"direction": "flipped"}}],
    "dasd_flip_low": ["group_normalized", {"directed_self_distillation": {"direction": "flip_low"}}],
    "dasd_flip_high": ["group_normalized", {"directed_self_distillation": {"direction": "flip_high"}}],
    "dasd_attract": ["group_normalized", {"directed_self_distillation": {"direction": "attract_only"}}],
    "dasd_repel": ["group_normalized", {"directed_self_distillation": {"direction": "repel_only"}}],
    "dasd_permuted": ["group_normalized", {"randomly_directed_self_distillation": {"shuffle": "router"}}],
    "dasd_permuted_gap": ["group_normalized", {"randomly_directed_self_distillation": {"shuffle": "gap"}}],
    "hepo": ["group_normalized", {"top_entropy": {"keep": 0.2, "normalize": "selected"}}],
    # Sampled forms: the teacher's prompt and weights make the difference (see docs/teachers.md).
    "opsd": ["teacher_log_ratio"],
    "sdpo": ["teacher_log_ratio"],
    "sdft": ["teacher_log_ratio"],
    "grpo_sd": ["group_normalized", {"add_teacher_gap": {"lam": 1.0}}],
    "rlsd": ["group_normalized", "rlsd"],
    "rlrt": ["group_normalized", "rlrt"],
    "srpo": ["group_normalized", "srpo"],
    "antisd": ["group_normalized", "antisd"],
}
